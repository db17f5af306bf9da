//! Stage admit: looks at a connection's first bytes where the listener asks for it, consuming none.

use std::io;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::Instant;

use super::limit::Permit;
use super::socket::end_cleanly;
use super::stats::End;
use super::{Intercept, Intercepted};

/// Longest wait for first bytes. A protocol in which the server speaks first is late by this much on a
/// listener that looks; clients that speak first are never late.
const FIRST_BYTES: Duration = Duration::from_millis(200);

/// Pause before looking again while the bytes may still become what is looked for.
const AGAIN: Duration = Duration::from_millis(5);

/// Longest of all first bytes looked for.
const LONGEST: usize = 64;

/// Lets the connection go on to a backend, or hands it over, with its permit, where its first bytes say so.
///
/// # Errors
/// When it goes no further: it was handed over, or the client broke it off.
pub(super) async fn admit(
    client: TcpStream,
    permit: &mut Option<Permit>,
    intercept: Option<&Intercept>,
) -> Result<TcpStream, End> {
    let Some(intercept) = intercept else { return Ok(client) };
    let wanted = Instant::now() + FIRST_BYTES;
    match tokio::time::timeout_at(wanted, begins_with(&client, intercept.first_bytes)).await {
        Ok(Ok(true)) => {}
        // Other bytes, or none in time.
        Ok(Ok(false)) | Err(_) => return Ok(client),
        // A socket tells of a reset once: the relay would take it for a clean end.
        Ok(Err(_)) => return Err(End::ClientReset),
    }
    let Ok(place) = intercept.taker.try_reserve() else { return Ok(client) };
    end_cleanly(&client);
    if let (Ok(stream), Some(permit)) = (client.into_std(), permit.take()) {
        place.send(Intercepted { stream, permit });
    }
    Err(End::Answered)
}

/// Whether the first bytes are one of `wanted`; waits as long as they may still become it.
async fn begins_with(client: &TcpStream, wanted: &[&[u8]]) -> io::Result<bool> {
    let mut first = [0; LONGEST];
    loop {
        let seen = client.peek(&mut first).await?;
        let seen = &first[..seen];
        if wanted.iter().any(|wanted| seen.starts_with(wanted)) {
            return Ok(true);
        }
        if seen.is_empty() || !wanted.iter().any(|wanted| wanted.starts_with(seen)) {
            return Ok(false);
        }
        // What was seen stays readable, so readiness tells nothing of new bytes.
        tokio::time::sleep(AGAIN).await;
    }
}
