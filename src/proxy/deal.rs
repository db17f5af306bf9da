//! The end of the stage accept: gives an accepted connection to the worker with the fewest connections.
//!
//! The kernel spreads new connections over the workers' sockets by chance. With few connections, one worker is then full
//! while others sleep. So a worker that has more connections than another one hands a new connection over. That costs
//! system calls and wakes the other worker, so a difference is tolerated where it hardly matters, or soon disappears.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::context::WorkerListener;
use super::limit::ConnectionPermit;
use super::sessions::Search;
use super::stats::WorkerStats;
use super::worker::WorkerCommand;
use super::{ListenerId, Serving};
use crate::stream::{Client, IdleStream, Stream};

/// A connection that another worker has accepted. Dropping it removes it from the
/// count of the worker that was chosen to serve it. It also resets the client: a FIN would look like a clean end.
pub(super) struct Dealt {
    pub(super) listener: ListenerId,
    /// The settings of its listener. The other worker may not have opened the listener yet, or may have closed it.
    pub(super) serving: Arc<Serving>,
    pub(super) peer: Client,
    connection: Option<(IdleStream, ConnectionPermit)>,
    stats: Arc<WorkerStats>,
}

impl Dealt {
    /// The connection, for the worker that serves it. From now on, the worker counts it itself.
    pub(super) fn serve(mut self) -> Option<(IdleStream, ConnectionPermit)> {
        self.connection.take()
    }

    /// The connection, which its worker does not count any more.
    fn take(mut self) -> Option<(IdleStream, ConnectionPermit)> {
        self.stats.connections.fetch_sub(1, Ordering::Relaxed);
        self.connection.take()
    }
}

impl Drop for Dealt {
    fn drop(&mut self) {
        if let Some((client, _permit)) = &self.connection {
            self.stats.connections.fetch_sub(1, Ordering::Relaxed);
            client.reset_on_close();
        }
    }
}

/// A worker as the others see it.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) stats: Arc<WorkerStats>,
    pub(super) commands: mpsc::UnboundedSender<WorkerCommand>,
    /// Searches of the open connections. A worker makes them one after the other, also while it drains.
    pub(super) searches: mpsc::UnboundedSender<Search>,
}

impl Peer {
    pub(super) fn tell(&self, command: WorkerCommand) {
        // A worker that has ended is reported by `WorkersEnded`.
        let _ = self.commands.send(command);
    }

    /// The receiver hears of the worker's next turn, or closes if the worker has ended.
    pub(super) fn ask(&self) -> oneshot::Receiver<()> {
        let (answer, answered) = oneshot::channel();
        self.tell(WorkerCommand::Answer(answer));
        answered
    }
}

/// Deals the connections that one worker accepts.
#[derive(Debug)]
pub(super) struct Dealer {
    own: usize,
    workers: Arc<[Peer]>,
}

/// A connection that lasts less than this is short. [`tolerated`] divides by 8 for the same reason.
pub(super) const SHORT: Duration = Duration::from_millis(125);

/// Attempts to count a connection for the worker that has the fewest, while others do the same.
const TRIES: usize = 8;

impl Dealer {
    /// The dealer of worker `own`, which is one of `workers`.
    pub(super) fn new(own: usize, workers: Arc<[Peer]>) -> Self {
        Self { own, workers }
    }

    /// Counts a connection for the worker that gets it, and hands it over if that is another one. Returns what this worker
    /// serves.
    pub(super) fn deal(
        &self,
        id: ListenerId,
        listener: &Rc<WorkerListener>,
        client: Stream,
        peer: Client,
        permit: ConnectionPermit,
    ) -> Option<(Stream, ConnectionPermit)> {
        let Some(worker) = self.claim() else { return Some((client, permit)) };
        let client = match client.into_idle() {
            Ok(client) => client,
            Err(error) => {
                // The connection is lost. The system's memory is exhausted if it cannot remove a socket from a set.
                tracing::debug!(%error, "cannot hand a connection over");
                worker.stats.connections.fetch_sub(1, Ordering::Relaxed);
                return None;
            }
        };
        let (serving, stats) = (Arc::clone(&listener.serving), Arc::clone(&worker.stats));
        let dealt = Dealt { listener: id, serving, peer, connection: Some((client, permit)), stats };
        let Err(mpsc::error::SendError(WorkerCommand::Serve(dealt))) =
            worker.commands.send(WorkerCommand::Serve(dealt))
        else {
            return None;
        };
        // The other worker has ended, or is about to.
        let (client, permit) = dealt.take()?;
        let client = Stream::try_from(client).ok()?;
        self.keep();
        Some((client, permit))
    }

    /// Counts a connection that this worker serves in any case.
    pub(super) fn keep(&self) {
        self.workers[self.own].stats.connections.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a connection for the worker that gets it; `None`: this one.
    fn claim(&self) -> Option<&Peer> {
        let own = &self.workers[self.own].stats;
        if self.workers.len() > 1 {
            for _ in 0..TRIES {
                let here = own.connections.load(Ordering::Relaxed);
                let (there, least) = self.least()?;
                let (count, worker) =
                    if here <= there + tolerated(here, own) { (here, None) } else { (there, Some(least)) };
                let counter = worker.map_or(&own.connections, |worker| &worker.stats.connections);
                // Fails if another worker has counted one meanwhile.
                if counter.compare_exchange(count, count + 1, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                    return worker;
                }
            }
        }
        self.keep();
        None
    }

    /// The worker with the fewest connections, and their number; among equals, the one that has moved the fewest bytes lately.
    fn least(&self) -> Option<(u64, &Peer)> {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let loads =
            self.workers.iter().map(|peer| (load(&peer.stats.connections), load(&peer.stats.bytes_lately), peer));
        loads
            .min_by_key(|(connections, bytes, _)| (*connections, *bytes))
            .map(|(connections, _, peer)| (connections, peer))
    }
}

/// The tolerated difference to the worker with the fewest connections.
fn tolerated(here: u64, own: &WorkerStats) -> u64 {
    // The rate of short connections times their longest duration is the most of them that are open at a time (Little's
    // law). If these are most of the connections, a difference is gone before a handover has paid off. Long connections
    // that end all at once, and come back, do not count.
    let are_short = own.short_per_second.load(Ordering::Relaxed) / 8 > here;
    if are_short { here / 2 } else { here / 32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dealer(connections: &[u64]) -> Dealer {
        let peer = |&connections: &u64| {
            let stats = WorkerStats { connections: connections.into(), ..WorkerStats::default() };
            Peer {
                stats: Arc::new(stats),
                commands: mpsc::unbounded_channel().0,
                searches: mpsc::unbounded_channel().0,
            }
        };
        Dealer::new(0, connections.iter().map(peer).collect())
    }

    fn counts(dealer: &Dealer) -> Vec<u64> {
        dealer.workers.iter().map(|peer| peer.stats.connections.load(Ordering::Relaxed)).collect()
    }

    fn after_dealing(connections: &[u64], times: usize) -> Vec<u64> {
        let dealer = dealer(connections);
        for _ in 0..times {
            dealer.claim();
        }
        counts(&dealer)
    }

    #[test]
    fn the_worker_with_the_fewest_connections_gets_the_next_one() {
        assert_eq!(after_dealing(&[0], 5), [5]);
        assert_eq!(after_dealing(&[0, 0, 0], 9), [3, 3, 3]);
        assert_eq!(after_dealing(&[7, 0, 3], 5), [7, 4, 4]);
        // A difference of a thirty-second is tolerated: 66 of 64.
        assert_eq!(after_dealing(&[64, 64], 3), [67, 64]);
        assert_eq!(after_dealing(&[64, 60], 1), [64, 61]);
    }

    #[test]
    fn among_equals_the_one_with_the_fewest_bytes_gets_it() {
        let dealer = dealer(&[1, 0, 0, 0]);
        for (peer, bytes) in std::iter::zip(&*dealer.workers, [0, 30, 10, 20]) {
            peer.stats.bytes_lately.store(bytes, Ordering::Relaxed);
        }
        dealer.claim();
        assert_eq!(counts(&dealer), [1, 0, 1, 0]);
    }

    #[test]
    fn short_connections_stay_unless_the_difference_is_large() {
        let dealer = dealer(&[20, 10]);
        dealer.workers[0].stats.short_per_second.store(5000, Ordering::Relaxed);
        dealer.claim();
        assert_eq!(counts(&dealer), [21, 10]);
        dealer.claim();
        assert_eq!(counts(&dealer), [21, 11]);
    }

    #[test]
    fn dealers_on_several_threads_never_disagree() {
        let first = Arc::new(dealer(&[0; 8]));
        let dealers: Vec<_> = (0..8).map(|own| Dealer::new(own, Arc::clone(&first.workers))).collect();
        std::thread::scope(|scope| {
            for dealer in &dealers {
                scope.spawn(|| {
                    for _ in 0..4 {
                        dealer.claim();
                    }
                });
            }
        });
        let most = counts(&first).into_iter().max().unwrap();
        assert!(most <= 5, "{:?}", counts(&first));
    }
}
