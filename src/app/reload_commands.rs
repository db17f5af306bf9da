//! The commands that go by a config: `reload` and `check`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::changes::Changes;
use super::commands::Planned;
use super::{App, StartError};
use crate::config::Config;
use crate::control::command::{CommandError, Report};

/// Longest time to read the config file.
const READ: Duration = Duration::from_secs(10);

impl App {
    /// Plans a reload of the file, or of another text.
    pub(super) async fn plan_config(
        &self,
        text: Option<String>,
        is_dry_run: bool,
        is_reset: bool,
        max_keys_moved: Option<u8>,
    ) -> Result<Planned, CommandError> {
        let is_from_file = text.is_none();
        let file = Arc::new(self.read(text, !is_dry_run).await?);
        let changes = if is_reset { Changes::default() } else { self.changes.kept(&self.file, &file) };
        let kept = changes.in_words(&file);
        if is_dry_run {
            let report = self.outlook(file, changes).await.report;
            return Ok(Planned::Report(Report { kept, ..report }));
        }
        if let Some(most) = max_keys_moved {
            // Before the preparation, which opens the access log again.
            let report = self.outlook(Arc::clone(&file), changes.clone()).await.report;
            if let Some(moved) = report.moved.iter().find(|moved| percent(moved.share) > most) {
                let (pool, moved) = (moved.pool.clone(), percent(moved.share));
                return Err(CommandError::TooManyKeys { pool, moved, most });
            }
        }
        match self.prepare(file, changes).await {
            Ok(mut plan) => {
                plan.report.kept = kept;
                Ok(Planned::Reload(Box::new(plan)))
            }
            Err(error) if is_from_file => Err(self.with_place(error).await),
            Err(error) => Err(CommandError::CannotPrepare(error.to_string())),
        }
    }

    /// The error with the line of the config file that it is about.
    async fn with_place(&self, error: StartError) -> CommandError {
        let (source, key_path) = (self.environment.source.clone(), error.key_path().map(str::to_owned));
        let place = tokio::task::spawn_blocking(move || source.place(&key_path?));
        let place = tokio::time::timeout(READ, place).await.ok().and_then(Result::ok).flatten();
        CommandError::CannotPrepare(place.map_or_else(|| error.to_string(), |place| format!("{place}: {error}")))
    }

    /// The config that a reload moves to. `tried`: Ringway is about to apply it. Does not block this thread: the file may be a FIFO that nobody writes, or on a
    /// server that is away.
    async fn read(&self, text: Option<String>, tried: bool) -> Result<Config, CommandError> {
        let (source, tried) = (self.environment.source.clone(), tried.then(|| Arc::clone(&self.tried)));
        let read = tokio::task::spawn_blocking(move || {
            if let Some(text) = text {
                return Config::parse(&text, "the config given");
            }
            // Before the load: what is written meanwhile is a change.
            if let Some(tried) = tried {
                tried.store(source.watched(&[]).1, Ordering::Relaxed);
            }
            source.load()
        });
        match tokio::time::timeout(READ, read).await {
            Ok(Ok(config)) => config.map_err(|error| CommandError::BadConfig(error.to_string())),
            Ok(Err(panicked)) => Err(CommandError::BadConfig(panicked.to_string())),
            Err(_elapsed) => Err(CommandError::BadConfig(format!(
                "the config file was not read within {} s: check that it is a regular file and that its file system answers",
                READ.as_secs()
            ))),
        }
    }
}

/// A share in percent, rounded up.
#[expect(clippy::cast_sign_loss, reason = "a share is from 0 to 1")]
fn percent(share: f64) -> u8 {
    (share * 100.0).ceil() as u8
}
