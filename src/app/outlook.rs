//! What a reload would change: the resulting config, the differences in words, and the share of keys that move. It runs on
//! a thread for blocking work: with a thousand pools it takes a while.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::App;
use super::changes::Changes;
use crate::backend::{Membership, State};
use crate::config::diff::differences;
use crate::config::{self, Config, Provider};
use crate::control::command::{Moved, Report};
use crate::control::provider;
use crate::ring::{Member, Ring};
use crate::table::{Owners, Table};

/// Keys that are looked up on the old and the new ring of a pool, if few pools change. The estimated share of moved keys is
/// then accurate to half a percent.
const MOST_KEYS: usize = 1 << 16;

/// The least number of keys for a pool: accurate to three percent.
const LEAST_KEYS: usize = 1 << 10;

/// Keys for all pools together.
const ALL_KEYS: usize = 1 << 20;

/// What a reload leads to.
pub(super) struct Outlook {
    /// The config with the run-time changes, and with the running values of the keys that require a restart.
    pub(super) config: Arc<Config>,
    /// The run-time changes without entries for slots that the config does not have.
    pub(super) changes: Changes,
    pub(super) report: Report,
}

/// What runs now.
struct Running {
    config: Arc<Config>,
    changes: Changes,
    tables: HashMap<String, Arc<Table>>,
}

impl App {
    /// What a reload to `file` with `changes` leads to. Changes nothing.
    pub(super) async fn outlook(&self, file: Arc<Config>, changes: Changes) -> Outlook {
        let tables = self.pools.iter().map(|pool| (pool.config().name.clone(), pool.route.table.load()));
        let running =
            Running { config: Arc::clone(&self.config), changes: self.changes.clone(), tables: tables.collect() };
        let outlook = tokio::task::spawn_blocking(move || running.outlook(&file, &changes));
        // It is pure, so a panic is a bug.
        outlook.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
    }
}

impl Running {
    fn outlook(&self, file: &Config, changes: &Changes) -> Outlook {
        let changes = changes.pruned(&changes.over(file));
        let mut config = changes.over(file);
        let mut needs_restart = keep_fixed(&mut config, &self.config);
        let shown = differences(&self.config, &config);
        needs_restart.sort();
        let replaced = config.pools.iter().filter(|pool| self.replaces(pool)).map(|pool| {
            format!("pools[{}]: Ringway rolls out the new settings; `ringway status` shows how far it is", pool.name)
        });
        let undrained = config.pools.iter().flat_map(|pool| self.undrained(pool, &changes));
        let of_slots = config.pools.iter().flat_map(|pool| self.slot_weights(pool, &changes));
        let report = Report {
            changes: shown.iter().map(ToString::to_string).chain(of_slots).chain(undrained).chain(replaced).collect(),
            moved: self.moved(&config, &changes),
            needs_restart,
            kept: Vec::new(),
        };
        Outlook { config: Arc::new(config), changes, report }
    }

    /// Whether the replicas of a pool would be outdated.
    fn replaces(&self, pool: &config::Pool) -> bool {
        let known = self.config.pools.iter().find(|known| known.name == pool.name);
        match (known.map(|known| &known.provider), &pool.provider) {
            (Some(Provider::Process(old)), Provider::Process(new)) => old.spec != new.spec,
            (Some(Provider::Containers(old)), Provider::Containers(new)) => old.spec != new.spec,
            _ => false,
        }
    }

    /// The drains that end, which no config holds.
    fn undrained(&self, pool: &config::Pool, changes: &Changes) -> Vec<String> {
        let (was, is) = (self.changes.get(&pool.name).drained, changes.get(&pool.name).drained);
        was.difference(&is).map(|id| format!("pools[{}]: {id} is no longer drained", pool.name)).collect()
    }

    /// The changes of the weights of a pool's slots, which no config holds.
    fn slot_weights(&self, pool: &config::Pool, changes: &Changes) -> Vec<String> {
        let (was, is) = (self.changes.get(&pool.name).weights, changes.get(&pool.name).weights);
        let is_supervised = pool.provider.replicas().is_some();
        let ids: BTreeSet<_> = was.keys().chain(is.keys()).filter(|_| is_supervised).collect();
        let weight = |weights: &BTreeMap<String, u32>, id: &String| weights.get(id).copied().unwrap_or(1);
        let pairs = ids.into_iter().map(|id| (id, weight(&was, id), weight(&is, id)));
        let changed = pairs.filter(|(_, was, is)| was != is);
        changed.map(|(id, was, is)| format!("pools[{}].slots[{id}].weight: {was} -> {is}", pool.name)).collect()
    }

    /// For each pool that would get other members, the share of keys that would move to another backend.
    fn moved(&self, config: &Config, changes: &Changes) -> Vec<Moved> {
        let changed = config.pools.iter().filter_map(|pool| {
            let table = self.tables.get(&pool.name)?;
            let members = members(pool, changes, table);
            let is_same = table.ring().parameters() == pool.parameters()
                && table.is_exclusive() == pool.is_exclusive
                && are_members(&members, table);
            (!is_same).then_some((pool, table, members))
        });
        let changed: Vec<_> = changed.collect();
        let keys = (ALL_KEYS / changed.len().max(1)).clamp(LEAST_KEYS, MOST_KEYS) as u32;
        let moved = changed.into_iter().filter_map(|(pool, table, members)| {
            let views: Vec<_> = members.iter().map(|(id, one)| Member { id, weight: one.weight }).collect();
            let ring = Ring::build(pool.parameters(), &views);
            let (old, new) = (table.owners(), Owners::new(&ring, members.iter().map(|(_, one)| *one)));
            // All keys of an exclusive pool go to its holder: the backend that holds it now, or one that nobody knows yet.
            let holder =
                table.backends().iter().find(|backend| backend.state == State::Healthy).map(|backend| &*backend.id);
            let stays = members.iter().any(|(id, one)| Some(&**id) == holder && one.takes_keys());
            let next = holder.filter(|_| stays && table.is_exclusive());
            let moves = |key: &u32| {
                let key = key.to_le_bytes();
                let owner = || old.of(&key).map(|owner| &*table.backends()[owner].id);
                let before = if table.is_exclusive() { holder } else { owner() };
                before != if pool.is_exclusive { next } else { new.of(&key).map(|owner| views[owner].id) }
            };
            let share = (0..keys).filter(moves).count() as f64 / f64::from(keys);
            if share == 0.0 {
                return None;
            }
            // Four digits are precise enough for a person.
            let share = (share * 1e4).round() / 1e4;
            Some(Moved { pool: pool.name.clone(), share })
        });
        moved.collect()
    }
}

/// The members of a pool's ring under a config.
fn members(pool: &config::Pool, changes: &Changes, table: &Table) -> Vec<(String, Membership)> {
    if let Some(backends) = pool.provider.static_backends() {
        return backends.iter().map(|backend| (backend.id.clone(), backend.membership)).collect();
    }
    if let Some(replicas) = pool.provider.replicas() {
        let weights = changes.get(&pool.name).weights;
        let slots = provider::slots(&pool.name, replicas);
        let weight = |slot: &str| Membership::weighing(weights.get(slot).copied().unwrap_or(1));
        return slots.iter().map(|slot| (slot.to_string(), weight(slot))).collect();
    }
    // Nobody but the engine or the name server knows the discovered backends: they stay.
    table.backends().iter().map(|backend| (backend.id.to_string(), backend.membership)).collect()
}

/// Whether the table has exactly these members, and none of them leaves. Cheaper than building a ring.
fn are_members(members: &[(String, Membership)], table: &Table) -> bool {
    let is_member = |(id, membership): &(String, Membership)| {
        let backend = table.backends().find(id);
        backend.is_some_and(|one| one.membership == *membership && !one.drain.is_some_and(|drain| drain.leaves))
    };
    let own = table.backends().iter().filter(|backend| backend.beside.is_none());
    members.len() == own.count() && members.iter().all(is_member)
}

/// Resets the keys of `new` that require a restart to their running values. Returns the key paths that differed.
fn keep_fixed(new: &mut Config, running: &Config) -> Vec<String> {
    let wanted = new.clone();
    new.workers = running.workers;
    new.relay = running.relay.clone();
    new.api = running.api.clone();
    new.docker = running.docker.clone();
    let by_name: HashMap<&str, &config::Pool> = running.pools.iter().map(|pool| (pool.name.as_str(), pool)).collect();
    for pool in &mut new.pools {
        let Some(known) = by_name.get(pool.name.as_str()) else { continue };
        pool.provider.keep_fixed(&known.provider);
    }
    differences(new, &wanted).into_iter().map(|difference| difference.path).collect()
}
