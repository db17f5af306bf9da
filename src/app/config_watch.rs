//! Reloads the config when its files change.

use tokio_util::task::AbortOnDropHandle;

use super::App;
use crate::config::{ConfigWatch, Source};
use crate::control::command::{Caller, Command, CommandSender};
use crate::file_watch::FileWatch;

impl App {
    /// Watches the config, or does not, as the running config says.
    pub(super) fn watch_config(&mut self) {
        let wanted = self.config.config_watch;
        if self.watching.as_ref().map(|(settings, _)| *settings) != wanted {
            let (source, commands) = (self.environment.source.clone(), self.state.commands().clone());
            let watch = |settings| (settings, AbortOnDropHandle::new(tokio::spawn(watch(source, settings, commands))));
            self.watching = wanted.map(watch);
        }
    }
}

/// Reloads when the contents of the files of the config change. A config that is refused stays refused until it changes again.
async fn watch(source: Source, settings: ConfigWatch, commands: CommandSender) {
    let (mut files, mut seen) = watched(&source, Vec::new()).await;
    let mut watch = FileWatch::new(files.clone(), settings.settle, settings.poll).await;
    loop {
        watch.changed().await;
        let now;
        (files, now) = watched(&source, files).await;
        watch.set_files(files.clone()).await;
        if std::mem::replace(&mut seen, now) == now {
            continue;
        }
        let max_keys_moved = settings.max_keys_moved;
        let reload = Command::Reload { text: None, is_dry_run: false, is_reset: false, max_keys_moved };
        // The app logs the outcome. Its config may have other settings of the watch, and this task ends then.
        let _ = commands.send(reload, Caller::ConfigWatch).await;
    }
}

/// The files of the config, and a hash of their contents. A file system may take long to answer.
async fn watched(source: &Source, before: Vec<std::path::PathBuf>) -> (Vec<std::path::PathBuf>, u64) {
    let source = source.clone();
    let known = before.clone();
    let read = tokio::task::spawn_blocking(move || source.watched(&known));
    read.await.unwrap_or((before, 0))
}
