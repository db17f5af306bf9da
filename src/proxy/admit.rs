//! Stage admit: applies the limits of the source address, and inspects a connection's first bytes. Consumes none of
//! them. Both happen only if the listener requires it.

use std::io;
use std::time::Duration;

use tokio::time::Instant;

use super::account::Outcome;
use super::limit::ConnectionPermit;
use super::not_served::NotServed;
use super::stats::EndReason;
use super::{Intercept, Intercepted, Serving};
use crate::stream::{Client, Stream};

/// Maximum wait for the first bytes. It delays protocols in which the server speaks first, and only on listeners that
/// inspect. Clients that speak first are never delayed.
const FIRST_BYTES: Duration = Duration::from_millis(200);

/// Pause before the next look while the bytes seen so far may still become a match.
const AGAIN: Duration = Duration::from_millis(5);

/// Length of the longest byte sequence that can be recognized.
const LONGEST: usize = 64;

/// Lets the connection continue to a backend.
///
/// # Errors
/// When it does not continue: its source is over a limit, Ringway answered it, or the client reset it.
pub(super) async fn admit(
    client: NotServed,
    peer: Client,
    permit: &mut Option<ConnectionPermit>,
    serving: &Serving,
) -> Result<NotServed, Outcome> {
    if let (Some(sources), Some(permit)) = (&serving.sources, permit.as_mut()) {
        permit.source = sources.admit(peer, std::time::Instant::now())?;
    }
    match &serving.intercept {
        Some(intercept) => Ok(inspect(client, peer, permit, intercept).await?),
        None => Ok(client),
    }
}

/// Returns the connection, or hands it and its permit over if its first bytes match.
async fn inspect(
    client: NotServed,
    peer: Client,
    permit: &mut Option<ConnectionPermit>,
    intercept: &Intercept,
) -> Result<NotServed, EndReason> {
    let wanted = Instant::now() + FIRST_BYTES;
    match tokio::time::timeout_at(wanted, begins_with(client.stream(), intercept.first_bytes)).await {
        Ok(Ok(true)) => {}
        // The bytes differ, or none arrived in time.
        Ok(Ok(false)) | Err(_) => return Ok(client),
        // A socket reports a reset only once. The relay would then read a clean end of stream.
        Ok(Err(_)) => return Err(EndReason::ClientReset),
    }
    let Ok(slot) = intercept.taker.try_reserve() else { return Ok(client) };
    if let (Ok(stream), Some(permit)) = (client.serve().into_idle(), permit.take()) {
        slot.send(Intercepted { stream, peer, permit });
    }
    Err(EndReason::Answered)
}

/// Whether the first bytes match one of `wanted`; waits while a match is still possible.
async fn begins_with(client: &Stream, wanted: &[&[u8]]) -> io::Result<bool> {
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
        // Peeked bytes stay readable, so readiness says nothing about new bytes.
        tokio::time::sleep(AGAIN).await;
    }
}
