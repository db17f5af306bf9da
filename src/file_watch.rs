//! Tells when files change.
//!
//! Every `poll`, the attributes of the files are compared: the kernel reports no changes on network file systems, and the file behind
//! a symbolic link can change far away. The kernel's reports (inotify(7)) on the folders of the files only make this happen sooner.
//! Folders are watched and not files, because editors and Kubernetes replace a file or a link instead of writing to it.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::net::unix::pipe::Receiver;

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
    /// A watch that tells of changes from now on. A change counts when the files have stayed the same for `settle`, so that a file that
    /// is written in several steps is complete. `poll` is the longest time until a change is seen.
    pub async fn new(files: Vec<PathBuf>, settle: Duration, poll: Duration) -> Self {
        let reports = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).ok();
        // It is read like a pipe, and its content does not matter.
        let reports = reports.and_then(|reports| Receiver::from_owned_fd_unchecked(reports).ok());
        let known = attributes(files.clone()).await;
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
        let mut seen: Option<(Vec<Attributes>, Instant)> = None;
        loop {
            let now = attributes(self.files.clone()).await;
            let settles = match seen.take() {
                _ if now == self.known => None,
                Some((before, since)) if before == now => Some((before, since)),
                _ => Some((now, Instant::now())),
            };
            let wait = match settles {
                Some((now, since)) if since.elapsed() >= self.settle => {
                    self.known = now;
                    return;
                }
                Some((now, since)) => {
                    let left = self.settle.saturating_sub(since.elapsed());
                    seen = Some((now, since));
                    left.min(self.poll)
                }
                None => self.poll,
            };
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

fn folders(files: &[PathBuf]) -> BTreeSet<&Path> {
    files
        .iter()
        .filter_map(|file| file.parent())
        .map(|folder| if folder.as_os_str().is_empty() { Path::new(".") } else { folder })
        .collect()
}

/// The attributes of files. A file system that does not answer stops only this task.
async fn attributes(files: Vec<PathBuf>) -> Vec<Attributes> {
    let count = files.len();
    let read = tokio::task::spawn_blocking(move || files.iter().map(|file| attributes_of(file)).collect());
    read.await.unwrap_or_else(|_| vec![None; count])
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
