//! Tells when files change.
//!
//! Every `poll`, the attributes of the files are compared: the kernel reports no changes on network file systems, and the file behind
//! a symbolic link can change far away. The kernel's reports (inotify(7)) on the folders of the files only make this happen sooner.
//! Folders are watched and not files, because editors and Kubernetes replace a file or a link instead of writing to it.

use std::collections::BTreeSet;
use std::fs::File;
use std::hash::{Hash as _, Hasher as _};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use seahash::SeaHasher;
use tokio::net::unix::pipe::Receiver;

/// Longest wait for the file system when a watch begins. Then its files count as missing.
const ANSWERS: Duration = Duration::from_secs(10);

/// Bytes of a file that count.
const LARGEST: u64 = 64 << 20;

/// Events within this time cause one look.
const TOGETHER: Duration = Duration::from_millis(50);

/// Watches files.
#[derive(Debug)]
pub struct FileWatch {
    files: Vec<PathBuf>,
    settle: Duration,
    poll: Duration,
    /// The attributes that the owner knows.
    known: Vec<Attributes>,
    /// The kernel's reports; `None`: it has no room for more of them.
    reports: Option<Receiver>,
}

/// What shows that a file is another one, or has another content; `None`: it cannot be seen.
type Attributes = Option<[i128; 5]>;

impl FileWatch {
    /// A watch that tells of changes from now on. A change counts when the contents have stayed the same for `settle`, so that a file
    /// that is written in several steps is complete. `poll` is the longest time until a change is seen.
    pub async fn new(files: Vec<PathBuf>, settle: Duration, poll: Duration) -> Self {
        let reports = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).ok();
        // It is read like a pipe, and its content does not matter.
        let reports = reports.and_then(|reports| Receiver::from_owned_fd_unchecked(reports).ok());
        let known = tokio::time::timeout(ANSWERS, attributes(files.clone())).await;
        let known = known.unwrap_or_else(|_elapsed| vec![None; files.len()]);
        Self { files, settle, poll, known, reports }
    }

    /// Watches these files from now on.
    pub async fn set_files(&mut self, files: Vec<PathBuf>) {
        if self.files != files {
            *self = Self::new(files, self.settle, self.poll).await;
        }
    }

    /// Waits until a file has changed.
    pub async fn changed(&mut self) {
        // The contents as last seen, and since when.
        let mut seen: Option<(u64, Instant)> = None;
        loop {
            let (now, contents) = look(self.files.clone(), self.known.clone()).await;
            let mut wait = self.poll;
            seen = match (contents, seen) {
                (None, _) => None,
                (Some(contents), Some((before, since))) if before == contents => Some((before, since)),
                (Some(contents), _) => Some((contents, Instant::now())),
            };
            if let Some((_, since)) = seen {
                if since.elapsed() >= self.settle {
                    self.known = now;
                    return;
                }
                wait = wait.min(self.settle.saturating_sub(since.elapsed()));
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.reported() => tokio::time::sleep(TOGETHER).await,
            }
        }
    }

    /// Waits for a report of the kernel.
    async fn reported(&self) {
        let Some(reports) = &self.reports else { return std::future::pending().await };
        // Not each write: another file of the folder may be a log.
        let wanted = WatchFlags::CLOSE_WRITE | WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVE;
        // Again each time: a folder may be new. The kernel knows those that it watches already.
        for folder in folders(&self.files) {
            let _ = inotify::add_watch(reports, folder, wanted);
        }
        // Without its reports the poll finds the changes.
        if reports.readable().await.is_err() {
            return std::future::pending().await;
        }
        let mut buffer = [0; 4096];
        while reports.try_read(&mut buffer).is_ok_and(|length| length > 0) {}
    }
}

/// The folders in which the files are, and the folders among them.
fn folders(files: &[PathBuf]) -> BTreeSet<&Path> {
    let parents = files.iter().filter_map(|file| file.parent());
    let parents = parents.map(|folder| if folder.as_os_str().is_empty() { Path::new(".") } else { folder });
    parents.chain(files.iter().map(PathBuf::as_path).filter(|file| file.is_dir())).collect()
}

/// The attributes of files.
async fn attributes(files: Vec<PathBuf>) -> Vec<Attributes> {
    look(files, Vec::new()).await.0
}

/// The attributes of files and, if they are not the known ones, a hash of the contents. A file system that does not answer stops only
/// the task that asks.
async fn look(files: Vec<PathBuf>, known: Vec<Attributes>) -> (Vec<Attributes>, Option<u64>) {
    let before = known.clone();
    let look = tokio::task::spawn_blocking(move || {
        let now: Vec<_> = files.iter().map(|file| attributes_of(file)).collect();
        let contents = (now != known).then(|| {
            let mut hasher = SeaHasher::new();
            for file in &files {
                content(file).hash(&mut hasher);
            }
            hasher.finish()
        });
        (now, contents)
    });
    look.await.unwrap_or((before, None))
}

/// The content of a regular file; `None`: it cannot be read.
pub fn content(file: &Path) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    // Reading a pipe could take forever.
    let file = if file.is_file() { File::open(file).ok()? } else { return None };
    file.take(LARGEST).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

fn attributes_of(file: &Path) -> Attributes {
    let data = std::fs::metadata(file).ok()?;
    let time = |seconds: i64, nanoseconds: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    Some([
        data.dev().into(),
        data.ino().into(),
        data.size().into(),
        time(data.mtime(), data.mtime_nsec()),
        time(data.ctime(), data.ctime_nsec()),
    ])
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    const SETTLE: Duration = Duration::from_millis(100);

    /// A poll that a test does not live to see.
    const NEVER: Duration = Duration::from_secs(3600);

    async fn sees(watch: &mut FileWatch) {
        tokio::time::timeout(Duration::from_secs(60), watch.changed()).await.expect("no change was seen");
    }

    async fn sees_nothing(watch: &mut FileWatch) {
        assert!(tokio::time::timeout(5 * SETTLE, watch.changed()).await.is_err(), "a change was seen");
    }

    async fn each_way_to_change_a_file(poll: Duration, has_reports: bool) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("list.yaml");
        fs::write(&file, "a").unwrap();
        let mut watch = FileWatch::new(vec![file.clone()], SETTLE, poll).await;
        watch.reports = watch.reports.filter(|_| has_reports);
        sees_nothing(&mut watch).await;
        fs::write(&file, "b").unwrap();
        sees(&mut watch).await;
        // As editors do.
        fs::write(folder.path().join("new"), "c").unwrap();
        fs::rename(folder.path().join("new"), &file).unwrap();
        sees(&mut watch).await;
        fs::remove_file(&file).unwrap();
        sees(&mut watch).await;
        fs::write(&file, "d").unwrap();
        sees(&mut watch).await;
        sees_nothing(&mut watch).await;
    }

    #[tokio::test]
    async fn the_kernel_reports_each_way_to_change_a_file() {
        each_way_to_change_a_file(NEVER, true).await;
    }

    #[tokio::test]
    async fn polls_find_each_way_to_change_a_file() {
        each_way_to_change_a_file(SETTLE / 10, false).await;
    }

    /// Kubernetes swaps a link to a folder of files.
    #[tokio::test]
    async fn a_swapped_link_is_a_change() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for version in ["1", "2"] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("list.yaml"), version).unwrap();
        }
        symlink("1", at("..data")).unwrap();
        symlink("..data/list.yaml", at("list.yaml")).unwrap();
        let mut watch = FileWatch::new(vec![at("list.yaml")], SETTLE, NEVER).await;
        symlink("2", at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        sees(&mut watch).await;
        assert_eq!(fs::read_to_string(at("list.yaml")).unwrap(), "2");
    }

    #[tokio::test]
    async fn a_file_that_is_being_written_does_not_count_yet() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("list.yaml");
        fs::write(&file, "").unwrap();
        // Longer than a machine under load may stop between two writes.
        let settle = Duration::from_secs(2);
        let mut watch = FileWatch::new(vec![file.clone()], settle, NEVER).await;
        let writer = tokio::spawn({
            let file = file.clone();
            async move {
                for step in 1..=8 {
                    fs::write(&file, "x".repeat(step)).unwrap();
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        });
        sees(&mut watch).await;
        assert!(writer.is_finished());
        assert_eq!(fs::read_to_string(&file).unwrap().len(), 8);
    }
}
