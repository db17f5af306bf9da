//! The PROXY protocol: in the stage admit, Ringway receives the header of a balancer before it; in the stage connect, it
//! sends one to the backend.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::time::Duration;

use super::account::Outcome;
use super::connection::{Connection, Proxied};
use super::context::WorkerListener;
use super::peek::first_bytes;
use super::stats::{EndReason, ProxyResult, RefusalReason};
use crate::networks::Networks;
use crate::proxy_header::{
    ALPN, AUTHORITY, Ends, LONGEST, Parsed, SendProxy, Tlv, UNIQUE_ID, Version, fields, parse, write, write_with,
};
use crate::stream::{Client, Stream};

/// Most bytes of fields that Ringway passes on. Known senders use a few dozen.
const MOST_PASSED: usize = 3072;

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
    let (result, ends, fields) = match read {
        Ok(read) => read?,
        // A backend must not get the beginning of a header as data.
        Err(_elapsed) if rules.is_required || has_begun.get() => (ProxyResult::Timeout, None, Vec::new()),
        Err(_elapsed) => (ProxyResult::Plain, None, Vec::new()),
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
                let _ = connection.proxied.set(Box::new(Proxied {
                    client: Client::Ip(source),
                    destination,
                    fields: RefCell::new(fields),
                }));
            }
            Ok(())
        }
    }
}

/// Reads a header and nothing behind it. Returns those of its fields that a route passes on. Sets `has_begun` once the
/// beginning of a header has arrived.
async fn read(
    client: &Stream,
    listener: &WorkerListener,
    is_required: bool,
    has_begun: &Cell<bool>,
) -> Result<(ProxyResult, Option<Ends>, Vec<u8>), Outcome> {
    let absent = if is_required { ProxyResult::Missing } else { ProxyResult::Plain };
    let worker = &listener.worker;
    let found = first_bytes(client, worker, LONGEST, |bytes, is_last| match parse(bytes) {
        Parsed::Header(header) => {
            let result = match (header.ends, header.version) {
                (None, _) => ProxyResult::Local,
                (Some(_), Version::V1) => ProxyResult::V1,
                (Some(_), Version::V2) => ProxyResult::V2,
            };
            Some((result, header.ends, passed(&bytes[header.fields..header.length], listener), header.length))
        }
        Parsed::Absent => Some((absent, None, Vec::new(), 0)),
        // A balancer probes like that.
        Parsed::Incomplete if bytes.is_empty() && is_last => Some((ProxyResult::Probe, None, Vec::new(), 0)),
        Parsed::Incomplete if !is_last => {
            has_begun.set(!bytes.is_empty());
            None
        }
        Parsed::Incomplete | Parsed::Invalid(_) => Some((ProxyResult::Invalid, None, Vec::new(), 0)),
    });
    // A socket reports a reset only once. The relay would then read a clean end of stream.
    let (result, ends, fields, length) = found.await.map_err(|_error| EndReason::ClientReset)?;
    if length > 0 {
        let mut scratch = worker.scratch.borrow_mut();
        client.take_first(&mut scratch[..length]).map_err(|_error| EndReason::ClientReset)?;
    }
    Ok((result, ends, fields))
}

/// Those of the fields that a route of the listener passes on.
fn passed(bytes: &[u8], listener: &WorkerListener) -> Vec<u8> {
    let wanted = fields(bytes).filter(|(kind, _)| listener.serving.routing.passes(*kind));
    let mut kept = Vec::new();
    for (kind, value) in wanted {
        // The next Ringway accepts at most 4 KiB, and the header also needs room for our own fields.
        if kept.len() + value.len() > MOST_PASSED {
            break;
        }
        kept.push(kind);
        kept.extend((value.len() as u16).to_be_bytes());
        kept.extend(value);
    }
    kept
}

/// The header that a backend gets before the bytes of a connection; empty: none.
pub(super) fn header_of(send: Option<&SendProxy>, client: &Stream, connection: &Connection) -> Vec<u8> {
    let proxied = connection.proxied.get();
    // Takes the fields out, so that the connection does not hold them until its end.
    let received = proxied.map_or(Vec::new(), |proxied| proxied.fields.take());
    let Some(send) = send else { return Vec::new() };
    let plain = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let ends = match connection.client() {
        Client::Ip(source) => {
            let destination = proxied.map_or_else(|| client.local_ip(), |proxied| Some(proxied.destination));
            destination.map(|destination| Ends { source: plain(source), destination: plain(destination) })
        }
        // A process on this host has no address.
        Client::Unix { .. } => None,
    };
    if send.version == Version::V1 {
        return write(send.version, ends);
    }
    let mut list: Vec<(u8, &[u8])> = fields(&received).filter(|(kind, _)| send.pass.contains(kind)).collect();
    let protocol = connection.hello.get().and_then(|hello| hello.protocols().next());
    let id = connection.id.to_string();
    let own = [
        (Tlv::Authority, AUTHORITY, connection.server_name().map(str::as_bytes)),
        (Tlv::Alpn, ALPN, protocol),
        (Tlv::UniqueId, UNIQUE_ID, Some(id.as_bytes())),
    ];
    for (_, kind, value) in own.into_iter().filter(|(tlv, ..)| send.tlvs.contains(tlv)) {
        // The balancer before Ringway is closer to the client, so its value wins.
        if list.iter().all(|(known, _)| *known != kind) {
            list.extend(value.map(|value| (kind, value)));
        }
    }
    write_with(ends, &list, send.tlvs.contains(&Tlv::Crc32c))
}
