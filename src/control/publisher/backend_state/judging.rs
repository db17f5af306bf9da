//! The state that the known facts about a backend give. Pure except for the log.

use std::time::Instant;

use super::{BackendState, Claim, Verdict};
use crate::backend::{Health, State};
use crate::control::publisher::Settings;
use crate::control::publisher::warmth::Warmth;
use crate::labels::Label as _;

impl BackendState {
    /// Whether the replica works, regardless of drains; `None`: unknown. An agent that says `stopped` before a maintenance does not ask
    /// for another replica.
    pub(in super::super) fn well(&self, settings: &Settings) -> Option<bool> {
        self.backend.address.as_ref()?;
        if self.backend.reported_bad || self.is_ejected {
            return Some(false);
        }
        match self.verdict {
            _ if !settings.is_checked => Some(true),
            // A replica that is not the primary works all the same.
            Some(Verdict::Declines) => Some(settings.rules.is_exclusive),
            verdict => verdict.map(|verdict| verdict == Verdict::Healthy),
        }
    }

    /// Begins or ends the backend's claim to an exclusive pool. `next` is the number of a new claim.
    pub(in super::super) fn settle_claim(&mut self, settings: &Settings, next: u64) {
        let can_serve = self.backend.membership.weight > 0 && self.own_state(settings) == State::Healthy;
        let claims = settings.rules.is_exclusive && can_serve;
        self.claim = claims.then(|| self.claim.unwrap_or(Claim { number: next, holds: false }));
    }

    /// Applies changed settings. A backend that becomes healthy through the settings alone gets all of its keys at
    /// once.
    pub(in super::super) fn settle(&mut self, settings: &Settings) {
        let state = self.state(settings);
        if state == State::Healthy && self.backend.state != State::Healthy {
            self.warmth = Warmth::default();
            self.show_admission();
        }
        self.backend.state = state;
        self.backend.well = self.well(settings);
    }

    /// Treats the backend as not checked yet.
    pub(in super::super) fn forget_verdict(&mut self, now: Instant) {
        self.verdict = None;
        self.backend.health = Health { last: None, verdict: None, since: now };
    }

    /// Treats the backend as having passed its checks.
    pub(in super::super) fn trust(&mut self) {
        self.verdict = Some(Verdict::Healthy);
    }

    pub(in super::super) fn state(&self, settings: &Settings) -> State {
        match self.own_state(settings) {
            State::Healthy if settings.rules.is_exclusive && !self.claim.is_some_and(|claim| claim.holds) => {
                State::Standby
            }
            state => state,
        }
    }

    /// The state by what is known about this backend alone.
    fn own_state(&self, settings: &Settings) -> State {
        match (&self.backend.address, self.verdict) {
            _ if self.backend.drain.is_some() => State::Draining,
            (None, _) if self.crash_loop => State::CrashLoop,
            (None, _) => State::Starting,
            (Some(_), _) if self.backend.reported_bad || self.is_advised_down() => State::Unhealthy,
            (Some(_), None) if settings.is_checked => State::Starting,
            (Some(_), Some(Verdict::Declines)) if settings.is_checked && settings.rules.is_exclusive => State::Standby,
            (Some(_), Some(Verdict::Declines | Verdict::Unhealthy)) if settings.is_checked => State::Unhealthy,
            (Some(_), _) if self.is_ejected => State::Ejected,
            (Some(_), _) => State::Healthy,
        }
    }

    /// Logs a change of state. The level follows its severity.
    pub(in super::super) fn tell(&self, pool: &str, state: State) {
        let backend = &self.backend;
        let (id, was, is) = (&backend.id, backend.state.as_str(), state.as_str());
        let check = backend.last_check().unwrap_or("-");
        match (backend.state, state) {
            // The supervisor has logged the crash loop; further tries are logged at debug level.
            (State::CrashLoop, State::Starting) | (_, State::CrashLoop) => {
                tracing::debug!(%pool, %id, was, check, "backend is {is}");
            }
            (_, State::Unhealthy | State::Ejected) => tracing::warn!(%pool, %id, was, check, "backend is {is}"),
            _ => tracing::info!(%pool, %id, was, check, "backend is {is}"),
        }
    }
}
