//! The provider `file`: backends that a file lists. Ringway applies its changes. A file with faults changes nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::list::{List, inherited, resolve, unknown_names};
use super::source::{Prepared, ProviderStatus, Source, Update};
use crate::app::StartError;
use crate::app::context::PoolContext;
use crate::app::tasks::until;
use crate::config::{self, BackendsFile, StaticBackend};
use crate::control::Event;
use crate::control::provider::ChangeKind;
use crate::control::provider::file::FileStatus;
use crate::file_watch::FileWatch;

/// How long a file must stay the same before Ringway applies it. Some tools write in several steps.
const SETTLE: Duration = Duration::from_secs(1);

/// Longest time until a change is seen on a file system that reports none.
const POLL: Duration = Duration::from_secs(5);

/// The channel to the task that follows the file.
#[derive(Debug)]
struct FromFile {
    /// The pool.
    current: watch::Sender<Arc<config::Pool>>,
    retired: CancellationToken,
}

/// The task that follows the file.
struct Follower {
    file: BackendsFile,
    current: watch::Receiver<Arc<config::Pool>>,
    list: List,
    /// What the list has been made from.
    backends: Vec<StaticBackend>,
    /// The text that Ringway has last applied or refused.
    seen: Option<String>,
    status: Arc<FileStatus>,
}

pub(super) async fn prepare(
    key_path: &str,
    pool: &config::Pool,
    file: &BackendsFile,
    context: &PoolContext<'_>,
) -> Result<Prepared, StartError> {
    let status = Arc::new(FileStatus::new(&file.path.display().to_string()));
    // Before the first read, or a change between both would not be seen.
    let watch = FileWatch::new(vec![file.path.to_path_buf()], SETTLE, POLL).await;
    let (text, read) = read(file.clone(), pool.clone()).await;
    let backends = match read {
        Ok(backends) => backends,
        // A machine may start before the tool that writes the file. A reload has a person who can mend the path.
        Err(problem) if context.is_start => {
            let pool = &pool.name;
            tracing::warn!(%pool, "{problem}; the pool starts without backends until the file can be applied");
            status.refused(&problem);
            Vec::new()
        }
        Err(problem) => return Err(unfit(key_path, problem)),
    };
    let (key_path, known) = (format!("{key_path}.provider.file"), inherited(&pool.name, context));
    let addresses = resolve(&key_path, &backends, |_| context.is_start, known).await?;
    if status.last().error.is_none() {
        status.applied(backends.len(), Instant::now());
        status.changes.add(ChangeKind::Joined, backends.len() as u64);
    }
    let (list, known) = List::new(&backends, addresses);
    let (current, receiver) = watch::channel(Arc::new(pool.clone()));
    let name: Arc<str> = pool.name.as_str().into();
    let follower = Follower {
        file: file.clone(),
        current: receiver,
        list: list.clone(),
        backends,
        seen: text,
        status: Arc::clone(&status),
    };
    let retired = CancellationToken::new();
    Ok(Prepared {
        source: Box::new(FromFile { current, retired: retired.clone() }),
        known,
        status: ProviderStatus::File(status),
        start: Box::new(move |start| {
            list.start(name, &start);
            let following = until(retired, follower.run(watch, start.events));
            start.tasks.spawn(until(start.over, following));
        }),
    })
}

/// What Ringway would find wrong with the file now.
pub(super) async fn faults(key_path: &str, pool: &config::Pool, file: &BackendsFile) -> Vec<StartError> {
    match read(file.clone(), pool.clone()).await.1 {
        Ok(backends) => unknown_names(&format!("{key_path}.provider.file"), &backends).await,
        Err(problem) => vec![unfit(key_path, format!("{problem}; the pool would start without backends"))],
    }
}

fn unfit(key_path: &str, problem: String) -> StartError {
    StartError::Unfit { key_path: format!("{key_path}.provider.file.path"), problem }
}

/// The text of the file and the backends that it lists, or what is wrong with it.
async fn read(file: BackendsFile, pool: config::Pool) -> (Option<String>, Result<Vec<StaticBackend>, String>) {
    // A file system may take long to answer.
    let read = tokio::task::spawn_blocking(move || {
        let text = match file.read() {
            Ok(text) => text,
            Err(error) => return (None, Err(error.to_string())),
        };
        let parsed = file.parse(&text).map_err(|error| error.to_string());
        let fits = parsed.and_then(|backends| pool.fits(&backends).map(|()| backends));
        (Some(text), fits)
    });
    read.await.unwrap_or_else(|panicked| (None, Err(panicked.to_string())))
}

impl Source for FromFile {
    fn update(&mut self, update: &Update<'_>) -> Vec<Event> {
        self.current.send_replace(Arc::new(update.pool.clone()));
        Vec::new()
    }

    fn retire(&self) {
        self.retired.cancel();
    }
}

impl Follower {
    async fn run(mut self, mut watch: FileWatch, events: mpsc::Sender<Event>) {
        loop {
            tokio::select! {
                () = watch.changed() => {}
                changed = self.current.changed() => if changed.is_err() {
                    return;
                }
            }
            for event in self.apply().await {
                if events.send(event).await.is_err() {
                    return;
                }
            }
        }
    }

    /// Reads the file, and applies it if it has another text than before.
    async fn apply(&mut self) -> Vec<Event> {
        let pool = Arc::clone(&self.current.borrow_and_update());
        let (text, read) = read(self.file.clone(), config::Pool::clone(&pool)).await;
        let is_known = text.is_some() && text == self.seen;
        let had_error = self.status.last().error.clone();
        match read {
            Ok(backends) => {
                if is_known && had_error.is_none() {
                    return Vec::new();
                }
                self.seen = text;
                let known = |backend: &StaticBackend| self.list.address(backend);
                // Unknown names are no error here.
                let found = resolve("provider.file", &backends, |_| true, known).await.unwrap_or_default();
                let events = self.list.change(&backends, &found, pool.drain);
                self.count(&pool.name, &backends);
                self.backends = backends;
                events
            }
            Err(problem) => {
                self.seen = text;
                if had_error.as_deref() != Some(&*problem) {
                    let (pool, backends) = (&pool.name, self.backends.len());
                    tracing::error!(%pool, backends, "{problem}; the backends of the last list stay");
                }
                self.status.refused(&problem);
                Vec::new()
            }
        }
    }

    /// Counts and logs what another list changes.
    fn count(&self, pool: &str, backends: &[StaticBackend]) {
        let before: HashMap<_, _> = self.backends.iter().map(|backend| (&backend.id, backend)).collect();
        let was = |backend: &&StaticBackend| before.get(&backend.id).copied();
        let joined = backends.iter().filter(|backend| was(backend).is_none()).count();
        let changed = backends.iter().filter(|backend| was(backend).is_some_and(|was| was != *backend)).count();
        let left = before.len() + joined - backends.len();
        for (kind, count) in [(ChangeKind::Joined, joined), (ChangeKind::Changed, changed), (ChangeKind::Left, left)] {
            self.status.changes.add(kind, count as u64);
        }
        self.status.applied(backends.len(), Instant::now());
        let path = self.file.path.display();
        tracing::info!(%pool, %path, backends = backends.len(), joined, changed, left, "applied the list of backends");
    }
}
