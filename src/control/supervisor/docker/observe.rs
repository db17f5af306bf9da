//! Derives the state of the slots from a full list: which container fills each slot, and which have ended.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use super::Containers;
use super::work::{Done, Work};
use crate::address::Address;
use crate::backend::{Exit, Replica};
use crate::control::Event;
use crate::control::docker::container::{Container, State};
use crate::control::docker::engine::Engine;
use crate::control::docker::label;
use crate::control::docker::watch::Seen;
use crate::control::provider::slot_number;
use crate::control::supervisor::plan::Place;
use crate::control::supervisor::{LAST_LINES, Slots};

/// A running container.
pub(super) struct Known {
    pub(super) id: Arc<str>,
    pub(super) replica: Replica,
    /// Digest of the settings that it was created from.
    pub(super) spec: String,
    /// The engine's id of its image.
    pub(super) image: Arc<str>,
    /// Its name in the last list.
    pub(super) name: Arc<str>,
    /// As last reported to the publisher.
    pub(super) address: Option<Address>,
    /// As last reported to the publisher.
    pub(super) is_bad: bool,
}

impl Known {
    /// The container under another name.
    pub(super) fn named(self, name: &str) -> Self {
        let (id, name) = (Arc::clone(&self.id), name.into());
        Self { replica: Replica::Container { id, name, check: None }, ..self }
    }
}

impl Containers {
    /// Applies a full list.
    pub(super) async fn take_list(&mut self, slots: &mut Slots, seen: Seen) {
        self.has_seen = true;
        let mut by_slot: HashMap<String, Vec<Container>> = HashMap::new();
        for container in seen.containers {
            by_slot.entry(container.label(label::SLOT).to_owned()).or_default().push(container);
        }
        let highest = by_slot.keys().filter_map(|name| slot_number(slots.pool(), name)).max();
        slots.extend(highest.unwrap_or_default());
        for slot in 0..slots.len() {
            let containers = by_slot.remove(&**slots.name(slot)).unwrap_or_default();
            let [front, beside] = [Place::front(slot), Place::beside(slot)];
            let skips = [front, beside].map(|place| {
                let is_older = self.changed.get(&place).is_some_and(|&changed| seen.as_of < changed);
                self.busy.contains_key(&place) || is_older
            });
            let [incumbent, other] = self.seat(slots, slot, containers, skips);
            if !skips[0] {
                self.observe_front(slots, front, incumbent).await;
            }
            if !skips[1] {
                self.observe_beside(slots, beside, other).await;
            }
            if skips == [false; 2] {
                self.mend_names(slots, slot);
            }
        }
        // The remaining containers name no valid slot.
        for container in by_slot.into_values().flatten() {
            self.remove_double(slots, Place::front(0), container);
        }
    }

    /// Finds the container of each seat of a slot, and removes the others. Every Ringway makes the same choice. A seat that is
    /// skipped has work in progress, which explains what is there.
    fn seat(
        &mut self,
        slots: &Slots,
        slot: usize,
        mut containers: Vec<Container>,
        skips: [bool; 2],
    ) -> [Option<Container>; 2] {
        containers.retain(|container| container.state != State::Removing);
        let [front, beside] = [Place::front(slot), Place::beside(slot)];
        let names = self.maker.names(slots.name(slot));
        let is_known =
            |container: &Container, place: Place| self.known.get(&place).is_some_and(|known| known.id == container.id);
        // After a flip the names change in two steps, between which Ringway may have ended.
        let is_half_named = !containers.iter().any(|container| *container.name == *names.current())
            && containers.iter().any(|container| *container.name == *names.former());
        let is_beside = |container: &Container| match &*container.name {
            _ if is_known(container, front) => false,
            _ if is_known(container, beside) => true,
            name if name == names.former() => true,
            name if name == names.next() => !is_half_named,
            _ => false,
        };
        let (mut others, mut incumbents): (Vec<_>, Vec<_>) = containers.into_iter().partition(is_beside);
        let order = |container: &Container, place: Place, name: &str| {
            let runs = container.state == State::Running;
            (runs, is_known(container, place), *container.name == *name, Arc::clone(&container.id))
        };
        incumbents.sort_by_key(|container| order(container, front, &names.current()));
        others.sort_by_key(|container| order(container, beside, &names.next()));
        let chosen = [incumbents.pop(), others.pop()];
        for (doubles, skips) in [(incumbents, skips[0]), (others, skips[1])] {
            doubles.into_iter().filter(|_| !skips).for_each(|double| self.remove_double(slots, front, double));
        }
        chosen
    }

    fn remove_double(&mut self, slots: &Slots, place: Place, double: Container) {
        if self.may_remove(&double) {
            tracing::warn!(pool = %slots.pool(), slot = double.label(label::SLOT), container = %double.name,
                "removing a duplicate or misnamed container");
            self.remove(place, double);
        }
    }

    /// Whether a container that fills no seat is not being removed yet. Notes that it is.
    fn may_remove(&mut self, double: &Container) -> bool {
        let is_held = self.double_backoff.until(&double.id, Instant::now()).is_some();
        !is_held && self.doubles.insert(Arc::clone(&double.id))
    }

    /// Gives the containers of a slot their names after a flip, if that has failed before.
    fn mend_names(&mut self, slots: &Slots, slot: usize) {
        let [front, beside] = [Place::front(slot), Place::beside(slot)];
        let names = self.maker.names(slots.name(slot));
        let is_named = |place: Place, name: &str| self.known.get(&place).is_some_and(|known| *known.name == *name);
        let is_wrong = is_named(front, &names.next()) || slots[beside].is_former && is_named(beside, &names.current());
        let is_free = !self.busy.contains_key(&front) && !self.busy.contains_key(&beside);
        if is_wrong && is_free && self.must_wait(beside, Work::Naming, Instant::now()).is_none() {
            self.name(slots, slot);
        }
    }

    /// Removes a container that fills no seat.
    fn remove(&mut self, place: Place, double: Container) {
        let (engine, grace) = (self.engine.clone(), self.settings.stop_grace);
        self.work.spawn(async move {
            let removed = engine.end(&double.id, grace).await;
            (place, Done::Removed(double.id, removed))
        });
    }

    async fn observe_front(&mut self, slots: &mut Slots, place: Place, incumbent: Option<Container>) {
        let now = Instant::now();
        self.leftovers.remove(&place);
        if place.slot >= slots.goal() as usize && !self.known.contains_key(&place) {
            // The plan stops and removes the container, whatever its state.
            match incumbent {
                Some(container) => {
                    if !slots[place].is_running() {
                        slots[place].running(false, now);
                    }
                    self.leftovers.insert(place, container);
                }
                None if slots[place].is_running() => slots.emptied(place, now).await,
                None => {}
            }
            return;
        }
        match incumbent {
            Some(container) if container.state == State::Running => self.runs(slots, place, &container, now).await,
            other => {
                let was_there = slots[place].is_running() || slots[place].is_starting();
                self.known.remove(&place);
                if was_there {
                    self.died(slots, place, other.as_ref()).await;
                }
                if let Some(container) = other {
                    self.leftovers.insert(place, container);
                }
            }
        }
    }

    async fn observe_beside(&mut self, slots: &mut Slots, place: Place, other: Option<Container>) {
        let now = Instant::now();
        self.leftovers.remove(&place);
        match other {
            Some(container) if container.state == State::Running => {
                let is_former = *container.name == *self.maker.names(slots.name(place.slot)).former();
                let is_new = self.known.get(&place).is_none_or(|known| known.id != container.id);
                self.runs(slots, place, &container, now).await;
                if is_new {
                    slots[place].is_former = is_former;
                }
            }
            other => {
                let was_there = slots[place].is_running() || slots[place].is_starting();
                self.known.remove(&place);
                match other {
                    other if was_there => self.died(slots, place, other.as_ref()).await,
                    // It never serves again: Ringway creates another one.
                    Some(container) if self.may_remove(&container) => self.remove(place, container),
                    _ => {}
                }
            }
        }
    }

    /// A container runs in the seat: reports its changes to the publisher.
    async fn runs(&mut self, slots: &mut Slots, place: Place, container: &Container, now: Instant) {
        if self.known.get(&place).is_none_or(|known| known.id != container.id) {
            self.meet(slots, place, container, now);
        }
        let Some(known) = self.known.get_mut(&place) else { return };
        known.name = Arc::clone(&container.name);
        let id = &slots[place].id;
        // A container created from other settings may listen on another port and be on another network.
        let port = container.label(label::PORT).parse().unwrap_or(self.settings.spec.port);
        let address = ip_of(container, &self.scope.network).map(|ip| Address::Ip(SocketAddr::new(ip, port)));
        let is_bad = container.healthy == Some(false);
        if known.address != address {
            match address.clone() {
                Some(address) => slots.report(place, address, known.replica.clone()).await,
                None => {
                    slots.send(Event::Stopped { id: Arc::clone(id), crash_loop: false, exit: None }).await;
                }
            }
            // A new address resets the reported health in the publisher.
            (known.address, known.is_bad) = (address, false);
        }
        if known.is_bad != is_bad {
            slots.send(Event::Reported { id: Arc::clone(id), healthy: !is_bad }).await;
            known.is_bad = is_bad;
        }
    }

    /// Records a new container in the seat.
    fn meet(&mut self, slots: &mut Slots, place: Place, container: &Container, now: Instant) {
        let (pool, name, network) = (slots.pool(), &slots[place].id, &self.scope.network);
        let digest = container.label(label::SPEC);
        let is_wanted = *self.maker.spec() == self.settings.spec && digest == self.maker.digest();
        if slots[place].is_starting() && is_wanted {
            // All others must have the same image.
            self.image = Some((self.settings.spec.image.clone(), Arc::clone(&container.image)));
        }
        let is_outdated = slots.is_settled && self.maker.is_outdated(digest, &container.image);
        let id = container.id.get(..12).unwrap_or(&container.id);
        match (slots[place].is_starting(), slots[place].is_first_try()) {
            (false, _) => tracing::info!(%pool, slot = %name, container = id, is_outdated, "replica adopted"),
            (true, true) => tracing::info!(%pool, slot = %name, container = id, "replica started"),
            // The end of the previous replica was logged.
            (true, false) => tracing::debug!(%pool, slot = %name, container = id, "replica started again"),
        }
        if ip_of(container, network).is_none() {
            let networks: Vec<_> = container.addresses.keys().collect();
            tracing::warn!(%pool, slot = %name, container = %container.name, network, ?networks,
                "replica is unreachable: it is not on Ringway's network");
        }
        slots[place].running(is_outdated, now);
        self.backoff.clear(&place);
        slots.note_start();
        let replica =
            Replica::Container { id: Arc::clone(&container.id), name: Arc::clone(&container.name), check: None };
        let (id, spec, image) = (Arc::clone(&container.id), digest.to_owned(), Arc::clone(&container.image));
        self.known.insert(
            place,
            Known { id, replica, spec, image, name: Arc::clone(&container.name), address: None, is_bad: false },
        );
    }

    /// The replica has ended. Ringway inspects the container at once, before it is removed for the next one.
    async fn died(&mut self, slots: &mut Slots, place: Place, container: Option<&Container>) {
        let event = Event::Stopped { id: Arc::clone(&slots[place].id), crash_loop: false, exit: None };
        slots.send(event).await;
        match container {
            Some(container) if container.state == State::Dead => {
                let (engine, id) = (self.engine.clone(), Arc::clone(&container.id));
                self.begin(place, Work::Examination, async move { Done::Examined(examine(&engine, &id).await) });
            }
            _ => slots.ended(place, gone()).await,
        }
    }
}

/// The container's address on Ringway's network, or else on the network it was created for.
fn ip_of(container: &Container, network: &str) -> Option<IpAddr> {
    let networks = [network, container.label(label::NETWORK)];
    networks.into_iter().find_map(|network| container.addresses.get(network).copied())
}

/// Finds out how a container ended.
async fn examine(engine: &Engine, id: &str) -> Exit {
    let Ok(found) = engine.inspect(id).await else { return gone() };
    let state = found.state.unwrap_or_default();
    let code = state.exit_code.unwrap_or_default();
    let mut reason = format!("exit code {code}");
    if state.oom_killed == Some(true) {
        reason += ", out of memory";
    }
    if let Some(error) = state.error.filter(|error| !error.is_empty()) {
        reason = format!("{reason}: {error}");
    }
    Exit { reason, code: Some(code), output: engine.last_lines(id, LAST_LINES).await, at: Instant::now() }
}

fn gone() -> Exit {
    Exit { reason: "the container is gone".to_owned(), code: None, output: Vec::new(), at: Instant::now() }
}
