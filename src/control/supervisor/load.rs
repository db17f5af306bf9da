//! Follows the load of a pool that scales by itself.

use std::time::{Duration, Instant};

use super::scaling::{Direction, Load, Scaler, ScalingView};
use super::{Adapter, SlotSettings, Supervisor};

/// Interval between looks at the connections of a pool that scales by itself.
const LOAD: Duration = Duration::from_secs(1);

impl<A: Adapter> Supervisor<A> {
    /// Scales the pool by its connections, if it does that. Returns when to look again.
    pub(super) async fn follow_load(&mut self, now: Instant) -> Option<Instant> {
        let SlotSettings { scaling, replicas: max, .. } = self.slots.settings;
        let Some(scaling) = scaling else {
            if self.slots.scaled.take().is_some() {
                self.scaler = Scaler::default();
                self.scaling.show(None);
            }
            return None;
        };
        let waiting = self.scaling.waiting.now() as u64;
        let (open, made) = self.slots.connections();
        // The sum falls when a slot leaves.
        let is_first = self.scaling.view().is_none();
        let any_began = made > std::mem::replace(&mut self.made, made) && !is_first;
        let load = Load { open, waiting, any_began };
        // Whoever was supervised before, by another Ringway or with another config, stays until the load says otherwise.
        let before = self.slots.scaled.unwrap_or_else(|| self.slots.in_use());
        let wanted = self.scaler.wanted(&scaling, max, before, load, now);
        if is_first || wanted != before || self.slots.scaled != Some(wanted) {
            if wanted != before && !is_first {
                let pool = self.slots.pool();
                let direction = if wanted > before { Direction::Up } else { Direction::Down };
                self.scaling.changes.count(direction);
                tracing::info!(%pool, from = before, to = wanted, connections = open, waiting, "scaling");
            }
            self.slots.scaled = Some(wanted);
            self.apply().await;
        }
        let since = self.scaling.view().filter(|view| view.wanted == wanted).map_or(now, |view| view.since);
        self.scaling.show(Some(ScalingView { min: scaling.min, max, wanted, since }));
        // A pool that sleeps is called, unless replicas of an old process still serve.
        (wanted > 0 || waiting > 0 || !self.slots.is_settled).then_some(now + LOAD)
    }
}
