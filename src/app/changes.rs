//! Run-time changes. Ringway keeps them separate from the config file, applies them on top of it, and drops a change
//! when a reload changes the same setting. Pure: no I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::config::{Config, Pool, StaticBackend};
use crate::control::command::Differs;
use crate::control::provider::slots;

/// All run-time changes, by pool name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Changes(BTreeMap<String, OfPool>);

/// The run-time changes of one pool.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct OfPool {
    pub(super) replicas: Option<u32>,
    pub(super) weights: BTreeMap<String, u32>,
    pub(super) added: Vec<StaticBackend>,
    pub(super) removed: BTreeSet<String>,
    pub(super) drained: BTreeSet<String>,
    #[serde(default)]
    pub(super) image: Option<String>,
}

impl Changes {
    /// Returns the changes of a pool for modification. Creates an empty entry if the pool has none.
    pub(super) fn of(&mut self, pool: &str) -> &mut OfPool {
        self.0.entry(pool.to_owned()).or_default()
    }

    /// Returns a copy of the changes of a pool. It is empty if the pool has none.
    pub(super) fn get(&self, pool: &str) -> OfPool {
        self.0.get(pool).cloned().unwrap_or_default()
    }

    /// Returns the changes whose values differ from the config, in words.
    pub(super) fn in_words(&self, config: &Config) -> Vec<String> {
        let of_pool = |pool: &Pool| {
            let differs = self.get(&pool.name).differs(pool);
            differs.iter().map(|differs| format!("pools[{}]: {}", pool.name, differs.in_words())).collect::<Vec<_>>()
        };
        config.pools.iter().flat_map(of_pool).collect()
    }

    /// Returns the config with the changes applied to it.
    pub(super) fn over(&self, config: &Config) -> Config {
        let mut config = config.clone();
        for pool in &mut config.pools {
            if let Some(changes) = self.0.get(&pool.name) {
                changes.lay_over(pool);
            }
        }
        config
    }

    /// Returns the changes without entries for slots that `config` does not have.
    pub(super) fn pruned(&self, config: &Config) -> Self {
        let mut pruned = self.clone();
        for pool in &config.pools {
            if let Some(changes) = pruned.0.get_mut(&pool.name) {
                changes.prune(pool);
            }
        }
        pruned
    }

    /// Returns the changes that survive a reload. A change is dropped if the new config has a different value for the
    /// same setting, or if the changed backend or pool no longer exists.
    pub(super) fn kept(&self, before: &Config, after: &Config) -> Self {
        let find = |config: &Config, name: &str| config.pools.iter().find(|pool| pool.name == name).cloned();
        let kept = self.0.iter().filter_map(|(name, changes)| {
            let kept = changes.kept(&find(before, name)?, &find(after, name)?);
            (kept != OfPool::default()).then(|| (name.clone(), kept))
        });
        Self(kept.collect())
    }
}

impl OfPool {
    /// Removes entries for slots that the pool does not have.
    fn prune(&mut self, pool: &Pool) {
        if let Some(replicas) = pool.provider.replicas() {
            let slots = slots(&pool.name, replicas);
            let is_there = |id: &str| slots.iter().any(|slot| **slot == *id);
            self.weights.retain(|id, _| is_there(id));
            self.drained.retain(|id| is_there(id));
        }
    }

    fn lay_over(&self, pool: &mut Pool) {
        if let Some(backends) = pool.provider.static_backends_mut() {
            backends.retain(|backend| !self.removed.contains(&backend.id));
            backends.extend(self.added.iter().cloned());
            for backend in backends {
                let weight = &mut backend.membership.weight;
                *weight = self.weights.get(&backend.id).copied().unwrap_or(*weight);
            }
        }
        if let Some(replicas) = self.replicas {
            pool.provider.set_replicas(replicas);
        }
        if let Some(image) = &self.image {
            pool.provider.set_image(image);
        }
    }

    fn kept(&self, before: &Pool, after: &Pool) -> Self {
        let mut kept = self.clone();
        let (before, after) = (&before.provider, &after.provider);
        if !before.is_same_kind(after) {
            return Self::default();
        }
        match (before.static_backends(), after.static_backends()) {
            (Some(before), Some(after)) => {
                let find = |list: &[StaticBackend], id: &str| list.iter().find(|backend| backend.id == id).cloned();
                kept.added.retain(|backend| find(after, &backend.id).is_none());
                kept.removed.retain(|id| find(before, id) == find(after, id));
                let is_there = |id: &str| {
                    let was_added = kept.added.iter().any(|backend| backend.id == id);
                    was_added || (find(after, id).is_some() && !kept.removed.contains(id))
                };
                let weight = |list: &[StaticBackend], id: &str| find(list, id).map(|backend| backend.membership.weight);
                kept.weights.retain(|id, _| is_there(id) && weight(before, id) == weight(after, id));
                kept.drained.retain(|id| is_there(id));
            }
            // A pool that scales by itself has no fixed number.
            _ if before.replicas() != after.replicas() || after.scaled().is_some() => kept.replicas = None,
            _ => {}
        }
        if before.image() != after.image() {
            kept.image = None;
        }
        kept
    }

    /// Returns the changes whose values differ from the config.
    pub(super) fn differs(&self, pool: &Pool) -> Vec<Differs> {
        let differs = |what: &str, backend: Option<&str>, config, now| Differs {
            what: what.to_owned(),
            backend: backend.map(Arc::from),
            config,
            now,
            image: None,
        };
        let configured = |id: &str| match pool.provider.static_backends() {
            Some(backends) => backends.iter().find(|backend| backend.id == id).map(|backend| backend.membership.weight),
            None => Some(1),
        };
        let replicas = self.replicas.filter(|&replicas| Some(replicas) != pool.provider.replicas());
        let mut list = Vec::new();
        list.extend(replicas.map(|now| differs("replicas", None, pool.provider.replicas(), Some(now))));
        let image = self.image.clone().filter(|image| Some(image.as_str()) != pool.provider.image());
        list.extend(image.map(|image| Differs { image: Some(image), ..differs("image", None, None, None) }));
        list.extend(self.added.iter().map(|backend| differs("added", Some(&backend.id), None, None)));
        list.extend(self.removed.iter().map(|id| differs("removed", Some(id), None, None)));
        let weights = self.weights.iter().filter(|&(id, &weight)| configured(id) != Some(weight));
        list.extend(weights.map(|(id, &weight)| differs("weight", Some(id), configured(id), Some(weight))));
        list.extend(self.drained.iter().map(|id| differs("drain", Some(id), None, None)));
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Membership;
    use crate::control::provider::Location;
    use crate::control::provider::names::Resolve;

    fn config(provider: &str) -> Config {
        let yaml = format!(
            "listeners: [{{ name: web, listen: \"127.0.0.1:0\", pool: p }}]\npools: [{{ name: p, provider: {{ {provider} }} }}]"
        );
        Config::parse(&yaml, "test").unwrap()
    }

    fn fixed(weights: &[u32]) -> Config {
        let list: Vec<_> = weights
            .iter()
            .enumerate()
            .map(|(n, weight)| format!("{{ address: \"127.0.0.1:{}\", id: b{n}, weight: {weight} }}", n + 1))
            .collect();
        config(&format!("static: [{}]", list.join(", ")))
    }

    fn process(replicas: u32) -> Config {
        config(&format!("process: {{ replicas: {replicas}, command: [server, \"{{port}}\"] }}"))
    }

    fn weights(config: &Config) -> Vec<(String, u32)> {
        let backends = config.pools[0].provider.static_backends().unwrap();
        backends.iter().map(|backend| (backend.id.clone(), backend.membership.weight)).collect()
    }

    fn added(id: &str) -> StaticBackend {
        StaticBackend {
            id: id.to_owned(),
            location: Location::parse("127.0.0.1:9").unwrap(),
            membership: Membership::weighing(1),
            resolve: Resolve::Refresh,
        }
    }

    #[test]
    fn changes_apply_to_the_config_and_are_listed() {
        let mut changes = Changes::default();
        let of = changes.of("p");
        of.weights.insert("b0".to_owned(), 5);
        of.removed.insert("b1".to_owned());
        of.added.push(added("x"));
        of.drained.insert("x".to_owned());
        let file = fixed(&[1, 1, 1]);
        let wanted: Vec<_> = [("b0", 5), ("b2", 1), ("x", 1)].map(|(id, weight)| (id.to_owned(), weight)).into();
        assert_eq!(weights(&changes.over(&file)), wanted);
        let differs: Vec<_> = changes.get("p").differs(&file.pools[0]).into_iter().map(|one| one.what).collect();
        assert_eq!(differs, ["added", "removed", "weight", "drain"]);
        assert_eq!(changes.kept(&file, &file), changes);
    }

    #[test]
    fn a_reload_drops_only_changes_to_settings_that_the_file_changed() {
        let mut changes = Changes::default();
        let of = changes.of("p");
        of.weights.extend([("b0".to_owned(), 5), ("b1".to_owned(), 7)]);
        of.drained.extend(["b0".to_owned(), "b2".to_owned()]);
        of.added.push(added("b3"));
        let kept = changes.kept(&fixed(&[1, 1, 1]), &fixed(&[2, 1])).get("p");
        assert_eq!(kept.weights.keys().collect::<Vec<_>>(), ["b1"], "the file changed the weight of b0");
        assert_eq!(kept.drained.iter().collect::<Vec<_>>(), ["b0"], "b2 no longer exists");
        assert_eq!(kept.added.len(), 1);
        let kept = changes.kept(&fixed(&[1, 1, 1]), &fixed(&[1, 1, 1, 1])).get("p");
        assert!(kept.added.is_empty(), "the file now lists b3");
        assert_eq!(changes.kept(&fixed(&[1]), &process(3)), Changes::default());

        let mut changes = Changes::default();
        changes.of("p").replicas = Some(5);
        assert_eq!(changes.over(&process(3)).pools[0].provider.replicas(), Some(5));
        assert_eq!(changes.kept(&process(3), &process(3)).get("p").replicas, Some(5));
        assert_eq!(changes.kept(&process(3), &process(4)).get("p").replicas, None);
        let scaled = config("process: { replicas: { max: 3 }, command: [server, \"{port}\"] }");
        assert_eq!(changes.kept(&process(3), &scaled).get("p").replicas, None);
    }

    #[test]
    fn a_change_equal_to_the_config_is_not_listed() {
        let mut changes = Changes::default();
        changes.of("p").replicas = Some(3);
        assert!(changes.get("p").differs(&process(3).pools[0]).is_empty());
        assert_eq!(changes.get("p").differs(&process(4).pools[0])[0].config, Some(4));
    }
}
