//! The corridor: the whole way of one connection, a line for each stage.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use tokio::net::TcpStream;

use super::account::{Account, Outcome};
use super::admit::{self, Admission};
use super::connect;
use super::key::Key;
use super::lane::Lane;
use super::limit::Permit;
use super::relay::Relay;
use super::stats::End;

/// Serves one accepted connection. The permit is its place under `max_connections`, those of listener and process.
///
/// The stages on the way to a backend are boxed: what they need is given back before the relay begins, which may
/// be idle for hours, ten thousandfold.
pub(super) async fn session(client: TcpStream, peer: SocketAddr, mut permit: Option<Permit>, lane: Rc<Lane>) {
    let mut account = Account::open(&lane, peer);

    if let Some(sources) = &lane.serving.sources {
        match sources.admit(peer.ip(), Instant::now()) {
            Ok(place) => {
                if let Some(permit) = &mut permit {
                    permit.source = place;
                }
            }
            Err(refusal) => return account.close(Outcome::Refused(refusal)),
        }
    }
    let client = match Box::pin(admit::admit(client, &mut permit, lane.serving.intercept.as_ref())).await {
        Admission::Relay(client) => client,
        Admission::HandedOver => return account.close(Outcome::Ended(End::Answered)),
        Admission::Broken => return account.close(Outcome::Ended(End::ClientReset)),
    };
    let key = Key::of(lane.serving.route.key, peer);
    let table = lane.table();
    let candidates = lane.serving.route.pick(&table, key.as_bytes());
    let (backend, progress) = match Box::pin(connect::connect(candidates, &lane.serving.route, &lane.serving.tcp)).await
    {
        Ok(connected) => (connected.stream, account.serve(connected.backend, connected.address, connected.place)),
        Err(refusal) => return account.close(Outcome::Refused(refusal)),
    };
    drop(table);
    let end = Relay::new(client, backend, progress).await;

    account.close(Outcome::Ended(end));
    drop(permit);
}
