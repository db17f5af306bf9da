//! Readiness: sets `ready` once every pool has had a healthy backend.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::api::State;

/// Longest time until this task notices the pools of a reload.
const NEW_VIEW: Duration = Duration::from_millis(500);

/// Sets `ready` once every pool has had a healthy backend. A reload may change the set of pools meanwhile.
pub(super) async fn become_ready(state: Arc<State>) {
    let mut have_had_one = HashSet::new();
    loop {
        let view = state.view();
        let of_now = view.pools.iter().filter(|pool| pool.table.load().any_healthy());
        have_had_one.extend(of_now.map(|pool| Arc::clone(&pool.pool)));
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
    if !state.ready.swap(true, Ordering::Relaxed) {
        tracing::info!(after = ?state.started.elapsed(), "ready");
    }
}
