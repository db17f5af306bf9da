//! The PROXY protocol: in the stage admit, Ringway receives the header of a balancer before it; in the stage connect, it
//! sends one to the backend.

use std::cell::Cell;
use std::net::SocketAddr;
use std::time::Duration;

use super::account::Outcome;
use super::connection::{Connection, Proxied};
use super::context::WorkerListener;
use super::peek::first_bytes;
use super::stats::{EndReason, ProxyResult, RefusalReason};
use crate::networks::Networks;
use crate::proxy_header::{Ends, LONGEST, Parsed, Version, parse, write};
use crate::stream::{Client, Stream};

/// From whom a listener accepts a PROXY header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyProtocol {
    /// Clients whose headers Ringway believes.
    pub from: Networks,
    /// Whether a believed client without a header is reset.
    pub is_required: bool,
    /// Whether all other clients are reset. Otherwise Ringway does not look for a header in their bytes.
    pub resets_others: bool,
    /// How long Ringway waits for the header.
    pub timeout: Duration,
}

/// Receives the header of a connection, if its peer may send one. The client in the header becomes the connection's client.
///
/// # Errors
/// When the connection does not continue.
pub(super) async fn receive(client: &Stream, connection: &Connection, rules: &ProxyProtocol) -> Result<(), Outcome> {
    if !rules.from.contains(connection.peer) {
        return if rules.resets_others { Err(RefusalReason::ProxyUntrusted.into()) } else { Ok(()) };
    }
    let listener = &connection.listener;
    let has_begun = Cell::new(false);
    let reading = read(client, listener, rules.is_required, &has_begun);
    let read = tokio::time::timeout(rules.timeout, reading).await;
    let (result, ends) = match read {
        Ok(read) => read?,
        // A backend must not get the beginning of a header as data.
        Err(_elapsed) if rules.is_required || has_begun.get() => (ProxyResult::Timeout, None),
        Err(_elapsed) => (ProxyResult::Plain, None),
    };
    listener.share().count_header(result);
    connection.proxy_header.set(Some(result));
    match result {
        ProxyResult::Probe => Err(EndReason::Finished.into()),
        ProxyResult::Missing => Err(RefusalReason::ProxyHeaderMissing.into()),
        ProxyResult::Invalid => Err(RefusalReason::ProxyHeaderInvalid.into()),
        ProxyResult::Timeout => Err(RefusalReason::ProxyHeaderTimeout.into()),
        ProxyResult::V1 | ProxyResult::V2 | ProxyResult::Local | ProxyResult::Plain => {
            if let Some(Ends { source, destination }) = ends {
                // A connection has one header.
                let _ = connection.proxied.set(Box::new(Proxied { client: Client::Ip(source), destination }));
            }
            Ok(())
        }
    }
}

/// Reads a header and nothing behind it. Sets `has_begun` once the beginning of a header has arrived.
async fn read(
    client: &Stream,
    listener: &WorkerListener,
    is_required: bool,
    has_begun: &Cell<bool>,
) -> Result<(ProxyResult, Option<Ends>), Outcome> {
    let absent = if is_required { ProxyResult::Missing } else { ProxyResult::Plain };
    let worker = &listener.worker;
    let found = first_bytes(client, worker, LONGEST, |bytes, is_last| match parse(bytes) {
        Parsed::Header(header) => {
            let result = match (header.ends, header.version) {
                (None, _) => ProxyResult::Local,
                (Some(_), Version::V1) => ProxyResult::V1,
                (Some(_), Version::V2) => ProxyResult::V2,
            };
            Some((result, header.ends, header.length))
        }
        Parsed::Absent => Some((absent, None, 0)),
        // A balancer probes like that.
        Parsed::Incomplete if bytes.is_empty() && is_last => Some((ProxyResult::Probe, None, 0)),
        Parsed::Incomplete if !is_last => {
            has_begun.set(!bytes.is_empty());
            None
        }
        Parsed::Incomplete | Parsed::Invalid(_) => Some((ProxyResult::Invalid, None, 0)),
    });
    // A socket reports a reset only once. The relay would then read a clean end of stream.
    let (result, ends, length) = found.await.map_err(|_error| EndReason::ClientReset)?;
    if length > 0 {
        let mut scratch = worker.scratch.borrow_mut();
        client.take_first(&mut scratch[..length]).map_err(|_error| EndReason::ClientReset)?;
    }
    Ok((result, ends))
}

/// The header that a backend gets before the bytes of a connection; empty: none.
pub(super) fn header_of(version: Option<Version>, client: &Stream, connection: &Connection) -> Vec<u8> {
    let Some(version) = version else { return Vec::new() };
    // A process on this host has no address.
    let Client::Ip(source) = connection.client() else { return write(version, None) };
    let destination = connection.proxied.get().map_or_else(|| client.local_ip(), |proxied| Some(proxied.destination));
    let plain = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    write(version, destination.map(|destination| Ends { source: plain(source), destination: plain(destination) }))
}
