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
use crate::control::supervisor::{LAST_LINES, Slots};

/// A running container.
pub(super) struct Known {
    pub(super) id: Arc<str>,
    pub(super) replica: Replica,
    /// Digest of the settings that it was created from.
    pub(super) spec: String,
    /// As last reported to the publisher.
    pub(super) address: Option<Address>,
    /// As last reported to the publisher.
    pub(super) is_bad: bool,
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
            let containers = by_slot.remove(&*slots[slot].name).unwrap_or_default();
            let is_older = self.changed.get(&slot).is_some_and(|&changed| seen.as_of < changed);
            if !self.busy.contains_key(&slot) && !is_older {
                let incumbent = self.choose(slots, slot, containers);
                self.observe_slot(slots, slot, incumbent).await;
            }
        }
        // The remaining containers name no valid slot.
        for container in by_slot.into_values().flatten() {
            self.remove_double(slots, 0, container);
        }
    }

    /// Chooses the container that fills the slot and removes the others. Every Ringway makes the same choice.
    fn choose(&mut self, slots: &Slots, slot: usize, mut containers: Vec<Container>) -> Option<Container> {
        containers.retain(|container| container.state != State::Removing);
        let name = self.maker.name(&slots[slot].name);
        containers.sort_by_key(|container| {
            (container.state == State::Running, *container.name == *name, Arc::clone(&container.id))
        });
        let incumbent = containers.pop();
        for double in containers {
            self.remove_double(slots, slot, double);
        }
        incumbent
    }

    fn remove_double(&mut self, slots: &Slots, slot: usize, double: Container) {
        let is_held = self.double_backoff.until(&double.id, Instant::now()).is_some();
        if !is_held && self.doubles.insert(Arc::clone(&double.id)) {
            tracing::warn!(pool = %slots.pool(), slot = double.label(label::SLOT), container = %double.name,
                "removing a duplicate or misnamed container");
            let (engine, grace) = (self.engine.clone(), self.settings.stop_grace);
            self.work.spawn(async move {
                let removed = engine.end(&double.id, grace).await;
                (slot, Done::Removed(double.id, removed))
            });
        }
    }

    async fn observe_slot(&mut self, slots: &mut Slots, slot: usize, incumbent: Option<Container>) {
        let now = Instant::now();
        self.leftovers.remove(&slot);
        if slot >= slots.settings.replicas as usize && !self.known.contains_key(&slot) {
            // The plan stops and removes the container, whatever its state.
            match incumbent {
                Some(container) => {
                    if !slots[slot].is_running() {
                        slots[slot].running(false, now);
                    }
                    self.leftovers.insert(slot, container);
                }
                None if slots[slot].is_running() => slots.emptied(slot, now),
                None => {}
            }
            return;
        }
        match incumbent {
            Some(container) if container.state == State::Running => self.runs(slots, slot, &container, now).await,
            other => {
                let was_there = slots[slot].is_running() || slots[slot].is_starting();
                self.known.remove(&slot);
                if was_there {
                    self.died(slots, slot, other.as_ref()).await;
                }
                if let Some(container) = other {
                    self.leftovers.insert(slot, container);
                }
            }
        }
    }

    /// A container runs in the slot: reports its changes to the publisher.
    async fn runs(&mut self, slots: &mut Slots, slot: usize, container: &Container, now: Instant) {
        if self.known.get(&slot).is_none_or(|known| known.id != container.id) {
            self.meet(slots, slot, container, now);
        }
        let Some(known) = self.known.get_mut(&slot) else { return };
        let name = &slots[slot].name;
        // A container created from other settings may listen on another port and be on another network.
        let port = container.label(label::PORT).parse().unwrap_or(self.settings.spec.port);
        let address = ip_of(container, &self.scope.network).map(|ip| Address::Ip(SocketAddr::new(ip, port)));
        let is_bad = container.healthy == Some(false);
        let mut news = Vec::new();
        if known.address != address {
            news.push(match address.clone() {
                Some(address) => {
                    let replica = Some(known.replica.clone());
                    Event::Started { id: Arc::clone(name), address, replica }
                }
                None => Event::Stopped { id: Arc::clone(name), crash_loop: false, exit: None },
            });
            // A new address resets the reported health in the publisher.
            (known.address, known.is_bad) = (address, false);
        }
        if known.is_bad != is_bad {
            news.push(Event::Reported { id: Arc::clone(name), healthy: !is_bad });
            known.is_bad = is_bad;
        }
        for event in news {
            slots.send(event).await;
        }
    }

    /// Records a new container in the slot.
    fn meet(&mut self, slots: &mut Slots, slot: usize, container: &Container, now: Instant) {
        let (pool, name, network) = (slots.pool(), &slots[slot].name, &self.scope.network);
        let is_outdated = slots.is_settled && container.label(label::SPEC) != self.maker.digest();
        let id = container.id.get(..12).unwrap_or(&container.id);
        match (slots[slot].is_starting(), slots[slot].is_first_try()) {
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
        slots[slot].running(is_outdated, now);
        self.backoff.clear(&slot);
        slots.note_start();
        let replica =
            Replica::Container { id: Arc::clone(&container.id), name: Arc::clone(&container.name), check: None };
        let spec = container.label(label::SPEC).to_owned();
        self.known.insert(slot, Known { id: Arc::clone(&container.id), replica, spec, address: None, is_bad: false });
    }

    /// The slot's replica has ended. Ringway inspects the container at once, before it is removed for the next one.
    async fn died(&mut self, slots: &mut Slots, slot: usize, container: Option<&Container>) {
        let event = Event::Stopped { id: Arc::clone(&slots[slot].name), crash_loop: false, exit: None };
        slots.send(event).await;
        match container {
            Some(container) if container.state == State::Dead => {
                let (engine, id) = (self.engine.clone(), Arc::clone(&container.id));
                self.begin(slot, Work::Examination, async move { Done::Examined(examine(&engine, &id).await) });
            }
            _ => slots.ended(slot, gone()).await,
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
