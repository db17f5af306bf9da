//! Lets a connection wait, unread, while its pool wakes.

use std::sync::Arc;
use std::time::Duration;

use super::stats::RefusalReason;
use crate::backend::Waiting;
use crate::table::{Table, TableCell};

/// How connections wake a pool.
#[derive(Debug, Clone)]
pub struct Wake {
    /// The connections that wait. The supervisor looks at them.
    pub waiting: Arc<Waiting>,
    /// How long a connection may wait.
    pub timeout: Duration,
    /// How many may wait at the same time.
    pub most: usize,
}

impl Wake {
    /// Waits until the pool has a backend whose checks have passed. `current`: the pool's current table.
    ///
    /// # Errors
    /// When too many connections wait, or no backend is healthy in time.
    pub(super) async fn wait<T: AsRef<Table>>(
        &self,
        table: &TableCell,
        mut current: impl FnMut() -> T,
    ) -> Result<(), RefusalReason> {
        let _permit = self.waiting.enter(self.most).ok_or(RefusalReason::TooManyWaiting)?;
        let mut changes = table.watch();
        let is_awake = async { while is_asleep(current().as_ref()) && changes.changed().await.is_ok() {} };
        tokio::time::timeout(self.timeout, is_awake).await.map_err(|_elapsed| RefusalReason::WakeTimeout)
    }
}

/// Whether the pool sleeps or wakes. A connection to a replica that is starting would fail.
pub(super) fn is_asleep(table: &Table) -> bool {
    table.awaits_first()
}
