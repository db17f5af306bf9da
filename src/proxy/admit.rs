//! Stage admit: receives a PROXY header, applies the access lists and the limits of the source address, and inspects a
//! connection's first bytes. The inspection consumes no bytes. Ringway does only what the listener asks for.

use std::rc::Rc;
use std::time::Duration;

use super::account::{Account, Outcome};
use super::not_served::NotServed;
use super::peek::first_bytes;
use super::proxy_protocol::receive;
use super::stats::EndReason;
use super::{Intercept, Intercepted};
use crate::labels::Label as _;

/// Maximum wait for the first bytes. It delays protocols in which the server speaks first, and only on listeners that
/// inspect. Clients that speak first are never delayed.
const FIRST_BYTES: Duration = Duration::from_millis(200);

/// Length of the longest byte sequence that can be recognized.
const LONGEST: usize = 64;

/// Lets the connection continue to a backend.
///
/// # Errors
/// When it does not continue: its PROXY header is not right, a list keeps its client out, its source is over a limit,
/// Ringway answered it, or the client reset it.
pub(super) async fn admit(client: NotServed, account: &mut Account) -> Result<NotServed, Outcome> {
    let connection = Rc::clone(&account.connection);
    let serving = &connection.listener.serving;
    if let Some(rules) = &serving.proxy_protocol {
        receive(client.stream(), &connection, rules).await?;
    }
    if let Some(refusal) = serving.routing.keeps_out(connection.client()) {
        tracing::debug!(listener = %serving.name, client = %connection.client(), reason = refusal.as_str(), "kept out");
        return Err(refusal.into());
    }
    if let (Some(sources), Some(permit)) = (&serving.sources, account.permit.as_mut()) {
        permit.source = sources.admit(connection.client(), std::time::Instant::now())?;
    }
    match &serving.intercept {
        Some(intercept) => Ok(inspect(client, account, intercept).await?),
        None => Ok(client),
    }
}

/// Returns the connection, or hands it and its permit over if its first bytes match.
async fn inspect(client: NotServed, account: &mut Account, intercept: &Intercept) -> Result<NotServed, EndReason> {
    let wanted = intercept.first_bytes;
    let looking = first_bytes(client.stream(), &account.connection.listener.worker, LONGEST, |bytes, is_last| {
        if wanted.iter().any(|wanted| bytes.starts_with(wanted)) {
            return Some(true);
        }
        let may_become = wanted.iter().any(|wanted| wanted.starts_with(bytes));
        (is_last || !may_become).then_some(false)
    });
    match tokio::time::timeout(FIRST_BYTES, looking).await {
        Ok(Ok(true)) => {}
        // The bytes differ, or none arrived in time.
        Ok(Ok(false)) | Err(_) => return Ok(client),
        // A socket reports a reset only once. The relay would then read a clean end of stream.
        Ok(Err(_)) => return Err(EndReason::ClientReset),
    }
    let Ok(slot) = intercept.taker.try_reserve() else { return Ok(client) };
    if let (Ok(stream), Some(permit)) = (client.serve().into_idle(), account.permit.take()) {
        slot.send(Intercepted { stream, client: account.connection.client(), permit });
    }
    Err(EndReason::Answered)
}
