//! The path of one connection through all stages, one line per stage.

use std::borrow::Cow;
use std::rc::Rc;

use super::account::{Account, Outcome};
use super::admit::admit;
use super::connect::{Want, connect};
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
    async move {
        let (mut relay, account) = connecting.await;
        let outcome = match &mut relay {
            Ok(relay) => relay.await.into(),
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
