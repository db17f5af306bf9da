//! The provider `file`: backends that a file lists. Ringway applies its changes. A file with faults changes nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::list::{List, resolve, unknown_names};
use super::source::{Prepared, ProviderStatus, Source, Update};
use crate::address::Address;
use crate::app::StartError;
use crate::app::context::PoolContext;
use crate::app::tasks::until;
use crate::config::{self, BackendsFile, Listener, StaticBackend};
use crate::control::Event;
use crate::control::provider::ChangeKind;
use crate::control::provider::file::FileStatus;
use crate::file_watch::FileWatch;

/// How long a file must stay the same before Ringway applies it. Some tools write in several steps.
const SETTLE: Duration = Duration::from_secs(1);

/// Longest time until a change is seen on a file system that reports none.
const POLL: Duration = Duration::from_secs(5);

/// Longest time to read the file.
const READ: Duration = Duration::from_secs(10);

/// The channels to the task that follows the file.
#[derive(Debug)]
struct FromFile {
    current: watch::Sender<Arc<Current>>,
    retired: CancellationToken,
}

/// What the list must fit.
#[derive(Debug)]
struct Current {
    pool: config::Pool,
    listeners: Vec<Listener>,
}

/// The task that follows the file.
struct Follower {
    file: BackendsFile,
    current: watch::Receiver<Arc<Current>>,
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
    let current = Arc::new(Current { pool: pool.clone(), listeners: context.config.listeners.clone() });
    // Before the first read, or a change between both would not be seen.
    let watch = FileWatch::new(vec![file.path.to_path_buf()], SETTLE, POLL).await;
    let (text, read) = read(file.clone(), Arc::clone(&current)).await;
    // An old process has had a list, perhaps from a file that has faults now.
    let inherited: Vec<_> = context.known(&pool.name).filter(|known| *known.name == *status.last().path).collect();
    let backends = match read {
        Ok(backends) => {
            status.applied(backends.len(), Instant::now());
            status.changes.add(ChangeKind::Joined, backends.len() as u64);
            backends
        }
        // A machine may start before the tool that writes the file. A reload has a person who can mend the path.
        Err(problem) if context.is_start => {
            let (pool, backends) = (&pool.name, inherited.len());
            tracing::warn!(%pool, backends, "{problem}; the pool starts with what is known, until the file can be applied");
            status.refused(&problem);
            inherited.iter().map(|known| known.listed()).collect()
        }
        Err(problem) => return Err(unfit(key_path, problem)),
    };
    let known: HashMap<&str, _> = inherited.iter().map(|known| (&*known.id, known.address)).collect();
    let known = |backend: &StaticBackend| known.get(backend.id.as_str()).map(|&address| Address::Ip(address));
    let key_path = format!("{key_path}.provider.file");
    let addresses = resolve(&key_path, &backends, &pool.connect.outgoing, |_| context.is_start, known).await?;
    let (list, known) = List::new(&backends, &pool.connect.outgoing, addresses);
    let (current, receiver) = watch::channel(current);
    let name: Arc<str> = pool.name.as_str().into();
    let (file, started, followed) = (file.clone(), list.clone(), Arc::clone(&status));
    let follower = Follower { file, current: receiver, list, backends, seen: text, status: followed };
    let retired = CancellationToken::new();
    Ok(Prepared {
        source: Box::new(FromFile { current, retired: retired.clone() }),
        known,
        status: ProviderStatus::File(status),
        start: Box::new(move |start| {
            started.start(name, &start);
            let following = until(retired, follower.run(watch, start.events));
            start.tasks.spawn(until(start.over, following));
        }),
    })
}

/// What Ringway would find wrong with the file now.
pub(super) async fn faults(key_path: &str, pool: &config::Pool, file: &BackendsFile) -> Vec<StartError> {
    match read(file.clone(), Arc::new(Current { pool: pool.clone(), listeners: Vec::new() })).await.1 {
        Ok(backends) => unknown_names(&format!("{key_path}.provider.file"), &backends, &pool.connect.outgoing).await,
        Err(problem) => vec![unfit(key_path, format!("{problem}; the pool would start without backends"))],
    }
}

fn unfit(key_path: &str, problem: String) -> StartError {
    StartError::Unfit { key_path: format!("{key_path}.provider.file.path"), problem }
}

/// The text of the file and the backends that it lists, or what is wrong with it.
async fn read(file: BackendsFile, current: Arc<Current>) -> (Option<String>, Result<Vec<StaticBackend>, String>) {
    let path = file.path.display().to_string();
    // A file system may take long to answer.
    let read = tokio::task::spawn_blocking(move || {
        let text = match file.read() {
            Ok(text) => text,
            Err(error) => return (None, Err(error.to_string())),
        };
        let parsed = file.parse(&text).map_err(|error| error.to_string());
        let fits = parsed.and_then(|backends| {
            let fits = current.pool.fits(&backends, &current.listeners);
            fits.map(|()| backends).map_err(|problem| format!("{}: {problem}", file.path.display()))
        });
        (Some(text), fits)
    });
    match tokio::time::timeout(READ, read).await {
        Ok(Ok(read)) => read,
        Ok(Err(panicked)) => (None, Err(panicked.to_string())),
        Err(_elapsed) => (None, Err(format!("{path} was not read within {} s: check its file system", READ.as_secs()))),
    }
}

impl Source for FromFile {
    fn update(&mut self, update: &Update<'_>) -> Vec<Event> {
        let listeners = update.config.listeners.clone();
        self.current.send_replace(Arc::new(Current { pool: update.pool.clone(), listeners }));
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
                // A list that did not fit may fit the new config. Otherwise only the watch looks at the file, at once.
                changed = self.current.changed() => match changed {
                    Ok(()) if self.status.last().error.is_some() => {}
                    Ok(()) => continue,
                    Err(_) => return,
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
        let current = Arc::clone(&self.current.borrow_and_update());
        let pool = &current.pool;
        let (text, read) = read(self.file.clone(), Arc::clone(&current)).await;
        let is_known = text.is_some() && text == self.seen;
        let had_error = self.status.last().error.clone();
        match read {
            Ok(backends) => {
                let outgoing = &pool.connect.outgoing;
                if is_known && had_error.is_none() && self.list.comes_from(outgoing) {
                    return Vec::new();
                }
                self.seen = text;
                let known = self.list.known();
                let known = |backend: &StaticBackend| known.address(backend);
                // Unknown names are no error here.
                let found = resolve("provider.file", &backends, outgoing, |_| true, known).await.unwrap_or_default();
                let events = self.list.change(&backends, outgoing, &found, pool.drain);
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
