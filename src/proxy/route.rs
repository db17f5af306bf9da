//! Stage route: finds the first rule of the listener that matches the connection. Looks at its first bytes only if a rule
//! or the pool's key needs them, and leaves them in the socket.

use std::cell::Cell;
use std::sync::atomic::Ordering;

use super::Route;
use super::account::Outcome;
use super::connection::Connection;
use super::peek::first_bytes;
use super::routing::{Begin, FirstBytes, HelloSettings};
use super::stats::{EndReason, HelloResult, RefusalReason};
use crate::client_hello::{Hello, Parsed, parse};
use crate::stream::Stream;

/// Bytes of a client's list of protocols that a connection keeps for the access log.
const KEPT_PROTOCOLS: usize = 256;

/// Returns the route of the connection, with its index among the listener's routes. Sets the connection's rule, and its
/// ClientHello if a rule or the key needs it.
///
/// # Errors
/// When no route takes the connection, or its first bytes decide nothing. Such a connection never takes the default route,
/// unless the config says so: the default may admit more clients than the route that was meant (as in CVE-2026-32305).
pub(super) async fn route<'a>(client: &Stream, connection: &'a Connection) -> Result<(usize, &'a Route), Outcome> {
    let routing = &*connection.listener.serving.routing;
    let from = connection.client();
    let rule = match routing.decide(from, None) {
        Some(rule) if !routing.route_of(rule).is_some_and(Route::needs_hello) => rule,
        _ => {
            let (result, hello) = look(client, connection, routing.hello).await?;
            let share = connection.listener.share();
            share.count_hello(result);
            let first_bytes = match (result, &hello) {
                (_, Some(hello)) => FirstBytes::Known(Begin::Tls(hello)),
                (HelloResult::Plain, None) => FirstBytes::Known(Begin::Plain),
                (HelloResult::Silent, None) => FirstBytes::Silent,
                (_, None) => FirstBytes::Undecided,
            };
            let rule = routing.settle(from, first_bytes);
            if let Some(mut hello) = hello {
                routing.hello_bytes.record(hello.length as f64);
                if hello.has_ech {
                    share.count_ech();
                }
                hello.shorten(KEPT_PROTOCOLS);
                // A connection has one ClientHello.
                let _ = connection.hello.set(Box::new(hello));
            }
            rule.ok_or(match result {
                HelloResult::TooLarge => RefusalReason::HelloTooLarge,
                HelloResult::Silent | HelloResult::Timeout => RefusalReason::HelloTimeout,
                _ => RefusalReason::HelloInvalid,
            })?
        }
    };
    connection.rule.set(rule.try_into().ok());
    if routing.has_rules() {
        routing.rules[rule].matched.fetch_add(1, Ordering::Relaxed);
    }
    let nth = routing.rules[rule].route.ok_or(RefusalReason::NoRoute)?;
    Ok((nth, &routing.routes[nth]))
}

/// Waits for a ClientHello, or for bytes that are none.
async fn look(
    client: &Stream,
    connection: &Connection,
    settings: HelloSettings,
) -> Result<(HelloResult, Option<Hello>), Outcome> {
    let worker = &connection.listener.worker;
    let most = settings.most.min(worker.scratch.borrow().len());
    let has_begun = Cell::new(false);
    let looking = first_bytes(client, worker, most, |bytes, is_last| match parse(bytes, most) {
        Parsed::Hello(hello) => {
            let result = if hello.server_name.is_some() { HelloResult::Sni } else { HelloResult::NoSni };
            Some((result, Some(hello)))
        }
        // A client that ends its stream without a byte never begins with TLS.
        Parsed::Incomplete if bytes.is_empty() && is_last => Some((HelloResult::Plain, None)),
        Parsed::Plain => Some((HelloResult::Plain, None)),
        Parsed::TooLarge => Some((HelloResult::TooLarge, None)),
        Parsed::Incomplete if bytes.len() == most => Some((HelloResult::TooLarge, None)),
        Parsed::Incomplete if is_last => Some((HelloResult::Invalid, None)),
        Parsed::Incomplete => {
            has_begun.set(!bytes.is_empty());
            None
        }
        Parsed::Invalid(fault) => {
            let listener = &connection.listener.serving.name;
            tracing::debug!(%listener, client = %connection.client(), %fault, "undecidable first bytes");
            Some((HelloResult::Invalid, None))
        }
    });
    match tokio::time::timeout(settings.timeout, looking).await {
        // A socket reports a reset only once. The relay would then read a clean end of stream.
        Ok(looked) => looked.map_err(|_error| EndReason::ClientReset.into()),
        Err(_elapsed) if has_begun.get() => Ok((HelloResult::Timeout, None)),
        Err(_elapsed) => Ok((HelloResult::Silent, None)),
    }
}
