//! Reloads the config when its files change.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio_util::task::AbortOnDropHandle;

use super::App;
use crate::config::{ConfigWatch, Source};
use crate::control::command::{Caller, Command, CommandSender};
use crate::file_watch::FileWatch;

/// A hash of the config files that Ringway last read to apply them, whoever asked for it.
pub(super) type Tried = Arc<AtomicU64>;

impl App {
    /// Watches the config, or does not, as the running config says.
    pub(super) fn watch_config(&mut self) {
        let wanted = self.config.config_watch;
        if self.watching.as_ref().map(|(settings, _)| *settings) != wanted {
            let watch = |settings| {
                let (source, commands) = (self.environment.source.clone(), self.state.commands().clone());
                let watching = watch(source, settings, commands, Arc::clone(&self.tried));
                (settings, AbortOnDropHandle::new(tokio::spawn(watching)))
            };
            self.watching = wanted.map(watch);
        }
    }
}

/// Reloads when the files of the config have another content than those that were tried. A config that is refused stays refused until
/// it changes again.
async fn watch(source: Source, settings: ConfigWatch, commands: CommandSender, tried: Tried) {
    let mut files = watched(&source, Vec::new()).await.0;
    let mut watch = FileWatch::new(files.clone(), settings.settle, settings.poll).await;
    loop {
        // The watch looks at the files before their contents are read, or a change between both would not be seen.
        let (depends_on, now) = watched(&source, files.clone()).await;
        if depends_on != files {
            files = depends_on;
            watch.set_files(files.clone()).await;
            continue;
        }
        if tried.load(Ordering::Relaxed) != now {
            let max_keys_moved = settings.max_keys_moved;
            let reload = Command::Reload { text: None, is_dry_run: false, is_reset: false, max_keys_moved };
            // The app logs the outcome, and notes what it has tried.
            let _ = commands.send(reload, Caller::ConfigWatch).await;
        }
        watch.changed().await;
    }
}

/// The files of the config, and a hash of their contents. A file system may take long to answer.
async fn watched(source: &Source, before: Vec<PathBuf>) -> (Vec<PathBuf>, u64) {
    let (source, known) = (source.clone(), before.clone());
    tokio::task::spawn_blocking(move || source.watched(&known)).await.unwrap_or((before, 0))
}
