//! Moves connections after a change of the ring: ends those whose keys lead to other backends now, evenly over a time and at
//! silent moments. Their clients connect again and get these backends.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Route;
use super::connection::{Connection, Served};
use super::key::{Key, KeyKind};
use super::pick::Homes;
use super::timeouts::SLOWEST;
use crate::table::{Table, TableCell};

/// A connection is silent when no byte has moved for this long.
const SILENT: Duration = Duration::from_secs(1);

/// Most tables before the last changes that a worker keeps.
const MOST_TABLES: usize = 16;

/// How long the last connections wait for a silent moment, if the time to move allows.
const WAIT: Duration = Duration::from_secs(10);

/// When a connection has to move, in tenths of a second by the worker's clock. More precise times would take more memory of each
/// connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct MoveTime {
    /// From then on, it ends at a silent moment.
    from: NonZeroU32,
    /// Then it ends anyway. The highest bit is [`ORDERED`].
    until: u32,
}

/// An operator has ordered it, by the settings that the pool had then. Otherwise an undone change keeps the connection. One bit: four
/// bytes more would put what a connection holds into the allocator's next class of sizes.
const ORDERED: u32 = 1 << 31;

/// The same, from a certain time on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MoveIn {
    from: Duration,
    until: Duration,
    ordered: bool,
}

impl MoveTime {
    /// The time that is left.
    pub(super) fn as_of(self, now: Duration) -> MoveIn {
        let left = |tenths: u32| Duration::from_millis(u64::from(tenths) * 100).saturating_sub(now);
        MoveIn { from: left(self.from.get()), until: left(self.until & !ORDERED), ordered: self.is_ordered() }
    }

    /// The time to move of a connection that has this time left.
    pub(super) fn after(now: Duration, left: MoveIn) -> Self {
        Self::new(now.saturating_add(left.from), now.saturating_add(left.until), left.ordered)
    }

    fn new(from: Duration, until: Duration, is_ordered: bool) -> Self {
        let until = tenths(until) | if is_ordered { ORDERED } else { 0 };
        Self { from: NonZeroU32::new(tenths(from)).unwrap_or(NonZeroU32::MIN), until }
    }

    fn is_ordered(self) -> bool {
        self.until & ORDERED != 0
    }

    /// Whether it ends now, silent or not.
    fn is_over(self, now: Duration) -> bool {
        self.until & !ORDERED <= tenths(now)
    }

    /// `silence`: how long no byte has moved; `None`: bytes wait, or one side has ended its stream and waits for an answer.
    fn has_come(self, now: Duration, silence: Option<Duration>) -> bool {
        self.from.get() <= tenths(now) && (silence.is_some_and(|silence| silence >= SILENT) || self.is_over(now))
    }
}

/// The clock of a worker that runs for five years stands still.
fn tenths(time: Duration) -> u32 {
    u32::try_from(time.as_millis() / 100).map_or(!ORDERED, |tenths| tenths.min(!ORDERED))
}

/// Gives each of these connections a time to move. The end of `over` remains for those that are not silent in their time.
/// `None`: each within the `on_move` that it began with.
pub(super) fn schedule(away: &[Rc<Connection>], over: Option<Duration>, now: Duration) {
    let is_ordered = over.is_some();
    for (n, connection) in away.iter().enumerate() {
        let over = over.or_else(|| connection.route()?.on_move);
        if let (Some(served), Some(over)) = (connection.served.get(), over) {
            // The pass that schedules and the one that ends the last connection come up to a tick late.
            let over = over.saturating_sub(2 * SLOWEST).max(over / 2);
            let rest = (over / 10).max(WAIT).min(over / 2);
            // By chance within its part of the time: workers with few connections would otherwise end them at the same moment.
            let part = (n as f64 + fastrand::f64()) / away.len() as f64;
            let from = now + over.saturating_sub(rest).mul_f64(part);
            served.moves.set(Some(MoveTime::new(from, now + over, is_ordered)));
        }
    }
}

/// The key of a connection.
fn key<'a>(connection: &'a Connection, route: &Route) -> Key<'a> {
    Key::of(route.key, connection.client(), connection.server_name())
}

/// Whether the connection has to end now.
pub(super) fn must_move(
    connection: &Connection,
    route: &Route,
    served: &Served,
    now: Duration,
    silent: Duration,
) -> bool {
    let is_idle = !connection.blocked.get() && !connection.half_closed.get();
    let Some(time) = served.moves.get().filter(|time| time.has_come(now, is_idle.then_some(silent))) else {
        return false;
    };
    let table = route.table.load();
    if time.is_ordered() {
        return !table.is_panic();
    }
    let key = key(connection, route);
    if Homes::new(route, &table).claim(key.as_bytes(), &served.backend) {
        return true;
    }
    // The change may have been undone. Or the other backend is full or down at this moment, which may pass.
    let is_home = table.candidates(key.as_bytes()).next().is_none_or(|(home, _)| *home.id == *served.backend);
    if is_home || time.is_over(now) {
        served.moves.set(None);
    }
    false
}

/// Whether the time to move of a connection is not over yet.
pub(super) fn can_wait(connection: &Connection) -> bool {
    let time = connection.served.get().and_then(|served| served.moves.get());
    time.is_some_and(|time| !time.is_over(connection.listener.worker.clock.get()))
}

/// Connections of a pool whose keys lead to other backends by its current settings.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The connections are going to be scheduled.
    pub(super) is_order: bool,
    pub(super) away: Vec<Rc<Connection>>,
    /// All that have a backend.
    pub(super) all: usize,
}

impl Found {
    /// Looks at a connection of the pool.
    pub(super) fn see(&mut self, connection: &Rc<Connection>, route: &Route, homes: &mut Homes<'_>) {
        let Some(served) = connection.served.get() else { return };
        self.all += 1;
        if route.key == KeyKind::Sni && connection.hello.get().is_none() {
            // It began before the pool had this key, and nobody has read the name.
            return;
        }
        if homes.claim(key(connection, route).as_bytes(), &served.backend) {
            self.away.push(Rc::clone(connection));
        } else if self.is_order && served.moves.get().is_some_and(MoveTime::is_ordered) {
            // The earlier order does not apply any more.
            served.moves.set(None);
        }
    }
}

/// The pools of a worker's connections that have `on_move`, by the address of their cell. It notices changes of their rings.
#[derive(Debug, Default)]
pub(super) struct Movers(HashMap<usize, Mover>);

#[derive(Debug)]
struct Mover {
    cell: TableCell,
    /// The tables before the last changes, as long as connections may come that were picked by one of them. A backend that is away for a
    /// moment makes two changes. Empty: the pool had no connections then.
    before: Vec<Arc<Table>>,
    table: Arc<Table>,
    /// When to look again: a connection may have been picked by the table before the change.
    again: Option<Duration>,
    /// How long after a pick a connection can come.
    latest: Duration,
    /// Whether this pass looks at the connections.
    looks: bool,
    /// Whether the pool still has connections.
    is_used: bool,
    /// Connections that need a time to move.
    away: Vec<Rc<Connection>>,
}

impl Movers {
    /// Begins a pass over all connections.
    pub(super) fn begin(&mut self, now: Duration) {
        self.0.retain(|_, mover| std::mem::take(&mut mover.is_used));
        for mover in self.0.values_mut() {
            let table = mover.cell.load();
            let has_changed = !table.places_like(&mover.table);
            let before = std::mem::replace(&mut mover.table, table);
            if has_changed {
                if mover.again.is_none() {
                    mover.before.clear();
                } else if mover.before.len() == MOST_TABLES {
                    mover.before.remove(0);
                }
                mover.before.push(before);
            }
            let is_due = mover.again.is_some_and(|again| again <= now);
            mover.looks = has_changed || is_due;
            mover.again = if has_changed { Some(now + mover.latest) } else { mover.again.filter(|_| !is_due) };
        }
    }

    /// Looks at a connection of a pool with `on_move`: whether a change has given its key to another backend.
    pub(super) fn see(&mut self, connection: &Rc<Connection>, route: &Route, served: &Served) {
        let mover = self.0.entry(route.table.address()).or_insert_with(|| {
            let (cell, table) = (route.table.clone(), route.table.load());
            let attempts = u32::try_from(route.connect_attempts).unwrap_or(u32::MAX);
            let latest = SLOWEST + route.connect_timeout.saturating_mul(attempts);
            // The ring may have changed since these connections began.
            Mover { cell, before: Vec::new(), table, again: None, latest, looks: true, is_used: true, away: Vec::new() }
        });
        mover.is_used = true;
        if !mover.looks || served.moves.get().is_some() {
            return;
        }
        let key = key(connection, route);
        let first = |table: &Table| table.candidates(key.as_bytes()).next().map(|(home, _)| Arc::clone(&home.id));
        let home = first(&mover.table);
        // A connection that is elsewhere for another reason stays there: its backend was full, or did not answer.
        let has_moved = || mover.before.is_empty() || mover.before.iter().any(|before| home != first(before));
        if home.as_ref().is_some_and(|home| *home != served.backend) && has_moved() {
            mover.away.push(Rc::clone(connection));
        }
    }

    /// Ends the pass: schedules the connections that it has found.
    pub(super) fn finish(&mut self, now: Duration) {
        for mover in self.0.values_mut().filter(|mover| mover.looks) {
            let mut away = std::mem::take(&mut mover.away);
            if let Some(first) = away.first().map(Rc::clone)
                && let Some(route) = first.route()
            {
                // The limits of the pool. The key of a connection that began before a reload can be another one.
                let mut homes = Homes::new(route, &mover.table);
                away.retain(|one| match (one.route(), one.served.get()) {
                    (Some(route), Some(served)) => homes.claim(key(one, route).as_bytes(), &served.backend),
                    _ => false,
                });
            }
            schedule(&away, None, now);
            if mover.again.is_none() {
                // Nothing needs the old tables any more.
                mover.before = vec![Arc::clone(&mover.table)];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_moves_at_a_silent_moment_and_at_last_anyway() {
        let second = Duration::from_secs;
        let time = MoveTime::new(second(10), second(20), false);
        assert!(!time.has_come(second(9), Some(second(60))));
        assert!(!time.has_come(second(10), Some(Duration::from_millis(900))));
        assert!(!time.has_come(second(10), None), "it is in the middle of something");
        assert!(time.has_come(second(10), Some(SILENT)));
        assert!(!time.has_come(second(19), Some(Duration::ZERO)));
        assert!(time.has_come(second(20), Some(Duration::ZERO)) && time.has_come(second(20), None));
        let left = MoveTime::new(second(10), second(20), true).as_of(second(4));
        let there = MoveTime::after(second(1000), left);
        assert!(there.is_ordered() && !there.has_come(second(1005), Some(SILENT)));
        assert!(
            there.has_come(second(1006), Some(SILENT)) && !there.is_over(second(1015)) && there.is_over(second(1016))
        );
        // The clock of a new worker.
        assert!(MoveTime::new(Duration::ZERO, Duration::ZERO, true).has_come(second(1), Some(SILENT)));
        assert!(MoveTime::new(Duration::MAX, Duration::MAX, true).has_come(Duration::MAX, Some(SILENT)));
    }
}
