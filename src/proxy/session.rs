//! The corridor: the whole way of one connection, a line for each stage.

use std::rc::Rc;
use std::time::Instant;

use tokio::net::TcpStream;

use super::account::{Account, Outcome};
use super::admit::admit;
use super::connect::connect;
use super::key::Key;
use super::relay::Relay;

/// Serves one accepted connection.
///
/// Idle connections come by the ten thousand, and each keeps this future for hours: it holds the relay and the account
/// once, and not what the stages before needed. So those are boxed, and this is no `async fn`, which would keep its
/// arguments beside what has become of them.
pub(super) fn session(client: TcpStream, mut account: Account) -> impl Future<Output = ()> {
    let way = Box::pin(async move {
        let relay = reach_backend(client, &mut account).await;
        (relay, account)
    });
    async move {
        let (mut relay, account) = way.await;
        let outcome = match &mut relay {
            Ok(relay) => relay.await.into(),
            Err(outcome) => *outcome,
        };
        drop(relay);
        account.close(outcome);
    }
}

/// The stages on the way to a backend.
async fn reach_backend(client: TcpStream, account: &mut Account) -> Result<Relay, Outcome> {
    let lane = Rc::clone(&account.lane);
    let (serving, peer) = (&lane.serving, account.client);

    if let (Some(sources), Some(permit)) = (&serving.sources, &mut account.permit) {
        permit.source = sources.admit(peer.ip(), Instant::now())?;
    }
    let client = admit(client, &mut account.permit, serving.intercept.as_ref()).await?;
    let key = Key::of(serving.route.key, peer);
    let table = lane.table();
    let candidates = serving.route.pick(&table, key.as_bytes());
    let backend = connect(candidates, &serving.route, &serving.tcp).await?;
    let progress = account.serve(backend.backend, backend.address, backend.place);
    Ok(Relay::new(client, backend.stream, progress))
}
