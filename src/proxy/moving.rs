//! Moving home: after a change of the ring, ends connections whose keys belong to other backends now, evenly over a time and at
//! silent moments. Their clients connect again, and reach the backends to which their keys lead.

use std::num::NonZeroU32;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::Route;
use super::connection::{Connection, Served};
use super::key::Key;
use super::pick::belongs_elsewhere;
use super::timeouts::SLOWEST;
use crate::table::{Table, TableCell};

/// A connection is silent when no byte has moved for this long.
const SILENT: Duration = Duration::from_secs(1);

/// How long the last connections wait for a silent moment, if the time to move allows.
const WAIT: Duration = Duration::from_secs(10);

/// When to look again after a change: a worker may have picked by the table before it.
const LATE: Duration = Duration::from_secs(5);

/// When a connection has to move, in tenths of a second by the worker's clock. It has no more precise times, because each
/// connection holds one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn {
    /// From then on, it ends at a silent moment.
    from: NonZeroU32,
    /// Then it ends anyway.
    until: u32,
}

impl Turn {
    fn new(from: Duration, until: Duration) -> Self {
        Self { from: NonZeroU32::new(tenths(from)).unwrap_or(NonZeroU32::MIN), until: tenths(until) }
    }

    fn has_come(self, now: Duration, silent: Duration) -> bool {
        let now = tenths(now);
        self.from.get() <= now && (silent >= SILENT || self.until <= now)
    }
}

/// The clock of a worker that runs for 13 years stands still.
fn tenths(time: Duration) -> u32 {
    u32::try_from(time.as_millis() / 100).unwrap_or(u32::MAX)
}

/// Gives each of these connections a turn within this time. The end of it remains for those that are not silent in their turn.
pub(super) fn give_turns(away: &[Rc<Connection>], over: Duration, now: Duration) {
    // The pass that gives the turns and the one that ends the last connection come up to a tick late.
    let over = over.saturating_sub(2 * SLOWEST).max(over / 2);
    let rest = (over / 10).max(WAIT).min(over / 2);
    let part = over.saturating_sub(rest) / u32::try_from(away.len().max(1)).unwrap_or(u32::MAX);
    let mut from = now + part / 2;
    for connection in away {
        if let Some(served) = connection.served.get() {
            served.turn.set(Some(Turn::new(from, now + over)));
        }
        from += part;
    }
}

/// Whether the key of a connection leads to another backend by this table.
pub(super) fn is_away(connection: &Connection, route: &Route, served: &Served, table: &Table) -> bool {
    let key = Key::of(route.key, connection.client(), connection.server_name());
    belongs_elsewhere(route, table, key.as_bytes(), &served.backend)
}

/// Whether the connection has to end now. One that has come home meanwhile loses its turn.
pub(super) fn must_move(
    connection: &Connection,
    route: &Route,
    served: &Served,
    now: Duration,
    silent: Duration,
) -> bool {
    if !served.turn.get().is_some_and(|turn| turn.has_come(now, silent)) {
        return false;
    }
    let is_away = is_away(connection, route, served, &route.table.load());
    if !is_away {
        served.turn.set(None);
    }
    is_away
}

/// Whether the time to move of a connection is not over yet.
pub(super) fn can_wait(connection: &Connection) -> bool {
    let turn = connection.served.get().and_then(|served| served.turn.get());
    turn.is_some_and(|turn| turn.until > tenths(connection.listener.worker.clock.get()))
}

/// The pools of a worker's connections that have `on_move`. It notices changes of their rings.
#[derive(Debug, Default)]
pub(super) struct Movers(Vec<Mover>);

#[derive(Debug)]
struct Mover {
    cell: TableCell,
    /// The table at the last look.
    table: Arc<Table>,
    /// When to look again.
    again: Option<Duration>,
    /// Whether this pass looks at the connections.
    looks: bool,
    /// Whether the pool still has connections.
    is_used: bool,
    /// Connections that need a turn.
    away: Vec<Rc<Connection>>,
}

impl Movers {
    /// Begins a pass over all connections.
    pub(super) fn begin(&mut self, now: Duration) {
        self.0.retain_mut(|mover| std::mem::take(&mut mover.is_used));
        for mover in &mut self.0 {
            let table = mover.cell.load();
            let has_changed = !table.places_like(&mover.table);
            mover.table = table;
            mover.looks = has_changed || mover.again.is_some_and(|again| again <= now);
            mover.again = if has_changed { Some(now + LATE) } else { mover.again.filter(|_| !mover.looks) };
        }
    }

    /// Looks at a connection of a pool with `on_move`.
    pub(super) fn see(&mut self, connection: &Rc<Connection>, route: &Route, served: &Served) {
        let known = self.0.iter().position(|mover| mover.cell.is_same(&route.table));
        let at = known.unwrap_or_else(|| {
            let (cell, table) = (route.table.clone(), route.table.load());
            self.0.push(Mover { cell, table, again: None, looks: true, is_used: true, away: Vec::new() });
            self.0.len() - 1
        });
        let mover = &mut self.0[at];
        mover.is_used = true;
        if !mover.looks {
            return;
        }
        if !is_away(connection, route, served, &mover.table) {
            served.turn.set(None);
        } else if served.turn.get().is_none() {
            mover.away.push(Rc::clone(connection));
        }
    }

    /// Ends the pass: gives turns to the connections that it has found away.
    pub(super) fn finish(&mut self, now: Duration) {
        for mover in &mut self.0 {
            let away = std::mem::take(&mut mover.away);
            // All are of one pool, and connections that began before a reload keep its older time.
            if let Some(over) = away.first().and_then(|first| first.route()?.on_move) {
                give_turns(&away, over, now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_comes_at_a_silent_moment_and_at_last_anyway() {
        let second = Duration::from_secs;
        let turn = Turn::new(second(10), second(20));
        assert!(!turn.has_come(second(9), second(60)));
        assert!(!turn.has_come(second(10), Duration::from_millis(900)));
        assert!(turn.has_come(second(10), SILENT));
        assert!(!turn.has_come(second(19), Duration::ZERO));
        assert!(turn.has_come(second(20), Duration::ZERO));
        // The clock of a new worker.
        assert!(Turn::new(Duration::ZERO, Duration::ZERO).has_come(second(1), SILENT));
        assert!(Turn::new(Duration::MAX, Duration::MAX).has_come(Duration::MAX, SILENT));
    }
}
