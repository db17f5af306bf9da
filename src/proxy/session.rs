//! The corridor: the whole way of one connection, a line for each stage.

use std::net::SocketAddr;
use std::rc::Rc;

use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;

use super::account::{Account, Outcome};
use super::admit::{self, Admission};
use super::connect;
use super::key::Key;
use super::lane::Lane;
use super::relay::Relay;
use super::stats::End;

/// Serves one accepted connection. The permit is its place under `max_connections`.
///
/// The stages on the way to a backend are boxed: what they need is given back before the relay begins, which may
/// be idle for hours, ten thousandfold.
pub(super) async fn session(client: TcpStream, peer: SocketAddr, permit: OwnedSemaphorePermit, lane: Rc<Lane>) {
    let mut account = Account::open(&lane, peer);

    let (client, _permit) = match Box::pin(admit::admit(client, permit, lane.intercept.as_ref())).await {
        Admission::Relay(client, permit) => (client, permit),
        Admission::HandedOver => return account.close(Outcome::Ended(End::Answered)),
        Admission::Broken => return account.close(Outcome::Ended(End::ClientReset)),
    };
    let key = Key::of(lane.route.key, peer);
    let table = lane.table();
    let candidates = table.candidates(key.as_bytes());
    let (backend, progress) = match Box::pin(connect::connect(candidates, &lane.route, &lane.worker.tcp)).await {
        Ok(connected) => (connected.stream, account.serve(connected.backend, connected.address)),
        Err(refusal) => return account.close(Outcome::Refused(refusal)),
    };
    drop(table);
    let end = Relay::new(client, backend, progress).await;

    account.close(Outcome::Ended(end));
}
