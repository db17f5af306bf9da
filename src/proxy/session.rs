//! The path of one connection through all stages, one line per stage.

use std::borrow::Cow;
use std::pin::Pin;
use std::rc::Rc;

use tokio::sync::watch;

use super::account::{Account, Outcome};
use super::admit::admit;
use super::connect::{Want, connect};
use super::handover::offer;
use super::key::Key;
use super::not_served::NotServed;
use super::proxy_protocol::header_of;
use super::relay::Relay;
use super::route::route;
use super::stats::EndReason;
use crate::stream::Stream;

/// Serves one accepted connection.
///
/// There can be tens of thousands of idle connections, and each keeps this future for hours. So the future stores only
/// the relay and the account, each once. The earlier stages are boxed and freed when they end. This is not an
/// `async fn`, which would also store its arguments.
pub(super) fn serve_connection(client: Stream, mut account: Account) -> impl Future<Output = ()> {
    // Not in the future: it may be dropped before its first poll.
    let client = NotServed::new(client);
    let connecting = Box::pin(async move {
        let connection = Rc::clone(&account.connection);
        let relay = tokio::select! {
            biased;
            relay = reach_backend(client, &mut account) => relay,
            reason = connection.ended_early() => Err(reason.into()),
        };
        (relay, account)
    });
    relaying(connecting)
}

/// Goes on with a connection that an old process has handed over, once `go` is true. If it closes before, the old process has kept the
/// connection.
pub(super) fn go_on(mut relay: Relay, account: Account, mut go: watch::Receiver<bool>) -> impl Future<Output = ()> {
    relaying(Box::pin(async move {
        if go.wait_for(|&go| go).await.is_err() {
            return (Err(EndReason::HandedOver.into()), account);
        }
        relay.go_on();
        (Ok(relay), account)
    }))
}

/// Relays once there is a backend, and closes the account.
#[expect(clippy::manual_async_fn, reason = "an async fn would store its argument twice")]
fn relaying(connecting: Pin<Box<impl Future<Output = (Result<Relay, Outcome>, Account)>>>) -> impl Future<Output = ()> {
    async move {
        let (mut relay, account) = connecting.await;
        let outcome = match &mut relay {
            Ok(relay) => loop {
                let end = (&mut *relay).await;
                if end != EndReason::HandedOver || Box::pin(offer(relay, &account)).await {
                    break end.into();
                }
            },
            Err(outcome) => *outcome,
        };
        drop(relay);
        account.close(outcome);
    }
}

/// Runs the stages up to the connection to a backend.
async fn reach_backend(client: NotServed, account: &mut Account) -> Result<Relay, Outcome> {
    let connection = Rc::clone(&account.connection);
    let listener = &connection.listener;

    let client = admit(client, account).await?;
    let (nth, route) = route(client.stream(), &connection).await?;
    let key = Key::of(route.key, connection.client(), connection.server_name());
    let header = header_of(route.send_proxy.as_deref(), client.stream(), &connection);
    let port =
        listener.serving.routing.keeps_port.then(|| client.stream().local_ip()).flatten().map(|local| local.port());
    let want = Want { key: key.as_bytes(), port, tcp: &listener.serving.tcp };
    let connect = connect(route, || listener.table(nth), want, |_| Cow::Borrowed(&header), &mut account.tries);
    let backend = tokio::select! {
        biased;
        backend = connect => backend?,
        () = client.is_reset() => return Err(EndReason::ClientReset.into()),
    };
    account.serve(backend.backend, backend.address, backend.permit);
    Ok(Relay::new(client.serve(), backend.stream, !header.is_empty(), Rc::clone(&connection)))
}
