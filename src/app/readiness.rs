//! Readiness: sets `ready` once every pool has had a healthy backend, and every backend its first verdict. A pool whose list is empty
//! counts as healthy.
//!
//! Without the second condition, the keys of a backend that is checked a little later would go to another one, and come
//! back. Envoy calls this warming.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::api::{ProviderView, State};
use crate::backend::{Backend, State as BackendState};
use crate::proxy::Route;

/// Longest time until this task notices the pools of a reload.
const NEW_VIEW: Duration = Duration::from_millis(500);

/// Longest wait for the first verdicts, once every pool has had a healthy backend.
const WARMING: Duration = Duration::from_secs(5);

/// Sets `ready` when the conditions are met. A reload may change the set of pools meanwhile.
pub(super) async fn become_ready(state: Arc<State>) {
    let mut have_had_one = HashSet::new();
    loop {
        let view = state.view();
        let of_now = std::iter::zip(&view.pools, &view.providers)
            .filter(|(pool, provider)| pool.table.load().any_healthy() || is_empty_on_purpose(pool, provider));
        have_had_one.extend(of_now.map(|(pool, _)| Arc::clone(&pool.pool)));
        if view.pools.iter().all(|pool| have_had_one.contains(&pool.pool)) {
            break;
        }
        let mut changes = tokio::task::JoinSet::new();
        for pool in view.pools.iter().filter(|pool| !have_had_one.contains(&pool.pool)) {
            let mut changes_of_pool = pool.table.watch();
            let table = pool.table.clone();
            changes
                .spawn(async move { while !table.load().any_healthy() && changes_of_pool.changed().await.is_ok() {} });
        }
        let _ = tokio::time::timeout(NEW_VIEW, changes.join_next()).await;
    }
    let all_judged = async {
        for pool in &state.view().pools {
            let mut changes = pool.table.watch();
            while pool.table.load().backends().iter().any(is_undecided) && changes.changed().await.is_ok() {}
        }
    };
    let _ = tokio::time::timeout(WARMING, all_judged).await;
    if !state.ready.swap(true, Ordering::Relaxed) {
        tracing::info!(after_seconds = state.started.elapsed().as_secs_f64(), "ready");
    }
}

/// A pool whose list has no backend that takes keys would not become healthy, and neither would one that sleeps.
pub(super) fn is_empty_on_purpose(pool: &Route, provider: &ProviderView) -> bool {
    let sleeps = provider.scaling.as_ref().and_then(|scaling| scaling.view()).is_some_and(|view| view.wanted == 0);
    sleeps
        || provider.status.has_list()
            && !pool.table.load().backends().iter().any(|backend| backend.membership.takes_keys())
}

/// A backend without an address waits for its name or its replica, which can take long.
fn is_undecided(backend: &Backend) -> bool {
    backend.state == BackendState::Starting && backend.address.is_some() && backend.beside.is_none()
}
