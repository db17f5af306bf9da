//! The path of one connection through all stages, one line per stage.

use std::rc::Rc;

use super::account::{Account, Outcome};
use super::admit::admit;
use super::connect::connect;
use super::key::Key;
use super::not_served::NotServed;
use super::proxy_protocol::header_of;
use super::relay::Relay;
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
        let relay = reach_backend(client, &mut account).await;
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
    let listener = Rc::clone(&account.listener);
    let route = &listener.serving.route;

    let client = admit(client, account).await?;
    let key = Key::of(route.key, account.origin.client());
    let header = header_of(route.send_proxy, client.stream(), account);
    let connect = connect(route, || listener.table(), key.as_bytes(), &listener.serving.tcp, &header);
    let backend = tokio::select! {
        biased;
        backend = connect => backend?,
        () = client.is_reset() => return Err(EndReason::ClientReset.into()),
    };
    let progress = account.serve(backend.backend, backend.address, backend.permit);
    Ok(Relay::new(client.serve(), backend.stream, !header.is_empty(), progress))
}
