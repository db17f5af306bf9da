//! The built program as a child process.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::NamedTempFile;

use super::watchdog::Watchdog;
use super::{PATIENCE, eventually};

/// A running `ringway`. It is killed when it is dropped, and its replicas end with it.
pub(crate) struct Program {
    child: Killed,
    /// The processes that have taken over, in order.
    successors: Vec<Pid>,
    log: Arc<Mutex<String>>,
    watchdogs: Vec<Watchdog>,
    closed: Arc<AtomicBool>,
    stalled: Arc<AtomicBool>,
    config: NamedTempFile,
    /// The folder of a copy of the binary, removed with this.
    binary: Option<tempfile::TempDir>,
}

impl Program {
    /// Starts `ringway run` with this config and waits until it listens.
    pub(crate) async fn start(yaml: &str) -> Self {
        Self::start_with(yaml, &[]).await
    }

    /// As [`Program::start`], with further environment variables.
    pub(crate) async fn start_with(yaml: &str, environment: &[(&str, &str)]) -> Self {
        Self::launch(Command::new(env!("CARGO_BIN_EXE_ringway")), yaml, environment, Stdio::null()).await
    }

    /// As [`Program::start`], with this standard output.
    pub(crate) async fn start_writing(yaml: &str, stdout: Stdio) -> Self {
        Self::launch(Command::new(env!("CARGO_BIN_EXE_ringway")), yaml, &[], stdout).await
    }

    /// As [`Program::start`], with at most this number of open files.
    pub(crate) async fn start_limited(yaml: &str, open_files: u32) -> Self {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("ulimit -n {open_files}; exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_ringway")]);
        Self::launch(shell, yaml, &[], Stdio::null()).await
    }

    /// As [`Program::start`], from a copy of the binary that [`Program::replace_binary`] can replace.
    pub(crate) async fn start_copy(yaml: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let binary = folder.path().join("ringway");
        std::fs::copy(env!("CARGO_BIN_EXE_ringway"), &binary).unwrap();
        let mut program = Self::launch(Command::new(binary), yaml, &[], Stdio::null()).await;
        program.binary = Some(folder);
        program
    }

    /// Puts a shell script in the place of the binary, so that the next upgrade runs it.
    pub(crate) fn replace_binary(&self, script: &str) {
        let folder = self.binary.as_ref().unwrap().path();
        let new = folder.join("new");
        std::fs::write(&new, script).unwrap();
        std::fs::set_permissions(&new, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::rename(new, folder.join("ringway")).unwrap();
    }

    /// As [`Program::start_with`], by `setpriv` with these arguments. Only root can do this.
    pub(crate) async fn start_as(user: &[&str], yaml: &str, environment: &[(&str, &str)]) -> Self {
        // The other user may not enter the folder of the built binary.
        let folder = tempfile::tempdir().unwrap();
        let binary = folder.path().join("ringway");
        std::fs::copy(env!("CARGO_BIN_EXE_ringway"), &binary).unwrap();
        for path in [folder.path(), &binary] {
            std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }
        let mut command = Command::new("setpriv");
        command.args(user).arg(&binary);
        let mut program = Self::launch(command, yaml, environment, Stdio::null()).await;
        program.binary = Some(folder);
        program
    }

    /// As [`Program::start`], with these files as `/etc/hosts` and `/etc/resolv.conf`. Only root can do this.
    pub(crate) async fn start_with_names(yaml: &str, hosts: &Path, resolver: &Path) -> Self {
        let mut shell = Command::new("unshare");
        let script = r#"mount --bind "$0" /etc/hosts && mount --bind "$1" /etc/resolv.conf && shift && exec "$@""#;
        shell.args(["--mount", "sh", "-c", script]).arg(hosts).arg(resolver).arg(env!("CARGO_BIN_EXE_ringway"));
        Self::launch(shell, yaml, &[], Stdio::null()).await
    }

    async fn launch(mut command: Command, yaml: &str, environment: &[(&str, &str)], stdout: Stdio) -> Self {
        // The clients of the tests need descriptors too.
        ringway::limits::raise_open_files();
        let config = file(yaml);
        // The program may run as another user.
        std::fs::set_permissions(config.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        let child = command
            .arg("--config")
            .arg(config.path())
            .envs(environment.iter().copied())
            .stderr(Stdio::piped())
            .stdout(stdout)
            .spawn();
        let mut child = Killed(child.unwrap());
        let log = Arc::new(Mutex::new(String::new()));
        let stderr = BufReader::new(child.0.stderr.take().unwrap());
        let sink = Arc::clone(&log);
        let closed = Arc::new(AtomicBool::new(false));
        let stalled = Arc::new(AtomicBool::new(false));
        let (close, stall) = (Arc::clone(&closed), Arc::clone(&stalled));
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if close.load(Ordering::Relaxed) {
                    return;
                }
                let mut log = sink.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
                drop(log);
                while stall.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        });
        let (successors, watchdogs) = (Vec::new(), Vec::new());
        let mut program = Self { child, successors, log, watchdogs, closed, stalled, config, binary: None };
        eventually("the banner", || {
            assert!(program.child.0.try_wait().unwrap().is_none(), "ringway ended:\n{}", program.log());
            program.log().contains(" status --api ")
        })
        .await;
        program.watch(program.pid());
        program
    }

    /// Replaces the content of the config file.
    pub(crate) fn config_path(&self) -> &Path {
        self.config.path()
    }

    pub(crate) fn write_config(&self, yaml: &str) {
        std::fs::write(self.config.path(), yaml).unwrap();
    }

    /// Puts a FIFO that nobody writes in the place of the config file.
    pub(crate) fn replace_config_by_fifo(&self) {
        std::fs::remove_file(self.config.path()).unwrap();
        let made = Command::new("mkfifo").arg(self.config.path()).status().unwrap();
        assert!(made.success());
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child.0)
    }

    /// Upgrades and returns the process id of the new process.
    pub(crate) async fn upgrade(&mut self) -> Pid {
        let answer = super::http(self.api(), "POST", "/api/upgrade", b"").await;
        assert_eq!(answer.status(), 200, "{}\n{}", String::from_utf8_lossy(answer.body()), self.log());
        self.follow().await
    }

    /// Returns the process id of the process that has taken over.
    pub(crate) async fn follow(&mut self) -> Pid {
        let pid = self.status().await["pid"].as_i64().unwrap();
        let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        self.successors.push(pid);
        self.watch(pid);
        pid
    }

    /// The process that has taken over last, or else the first one.
    pub(crate) fn newest(&self) -> Pid {
        self.successors.last().copied().unwrap_or_else(|| self.pid())
    }

    fn watch(&mut self, pid: Pid) {
        let main = pid.as_raw_nonzero().get();
        self.watchdogs.push(Watchdog::watch(main, main));
    }

    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Stops reading the log. The reading end closes at the next line.
    pub(crate) fn close_log(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    /// Stops reading the log, or goes on reading it.
    pub(crate) fn stall_log(&self, stall: bool) {
        self.stalled.store(stall, Ordering::Relaxed);
    }

    /// The address of the first listener, from the banner.
    pub(crate) fn web(&self) -> SocketAddr {
        self.address_before("web:")
    }

    pub(crate) fn api(&self) -> SocketAddr {
        self.address_before("side port:")
    }

    fn address_before(&self, what: &str) -> SocketAddr {
        let log = self.log();
        let line = log.lines().find(|line| line.contains(what)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// The status from the side port.
    pub(crate) async fn status(&self) -> serde_json::Value {
        serde_json::from_str(&super::get(self.api(), "/api/status").await.1).unwrap()
    }

    /// The process ids of the replicas, by slot.
    pub(crate) async fn replicas(&self) -> Vec<Pid> {
        let status = self.status().await;
        let backends = status["pools"][0]["backends"].as_array().unwrap();
        backends
            .iter()
            .filter_map(|backend| Pid::from_raw(i32::try_from(backend["replica"]["pid"].as_i64()?).unwrap()))
            .collect()
    }

    /// Waits until Ringway is ready and has tried every slot.
    pub(crate) async fn ready(self) -> Self {
        super::eventually_async("ready", async || super::get(self.api(), "/readyz").await.0 == 200).await;
        super::eventually_async("every slot tried", async || {
            let status = self.status().await;
            let pools = status["pools"].as_array().unwrap();
            let backends = pools.iter().flat_map(|pool| pool["backends"].as_array().unwrap());
            backends.into_iter().all(|one| one["state"] != "starting" || !one["address"].is_null())
        })
        .await;
        self
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits for the exit status.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        // At its end, Ringway gives the reader of a log a second.
        self.watchdogs.clear();
        let mut status = None;
        eventually("the program's end", || {
            status = self.child.0.try_wait().unwrap();
            status.is_some()
        })
        .await;
        status.unwrap()
    }

    /// CPU time used so far, in clock ticks of 10 ms.
    pub(crate) fn cpu_ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.0.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    /// Anonymous memory in bytes, which the program has allocated.
    pub(crate) fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.0.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("log of ringway {}:\n{}", self.child.0.id(), self.log());
        }
        for &successor in &self.successors {
            // The process may have exited already.
            let _ = kill_process(successor, Signal::KILL);
        }
    }
}

/// A child that is killed when it is dropped.
pub(crate) struct Killed(pub(crate) Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A config file that is removed when it is dropped.
pub(crate) fn file(yaml: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(yaml.as_bytes()).unwrap();
    file
}

/// Runs `ringway` to its end and returns the exit code, standard output and standard error.
pub(crate) fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ringway"))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Beside the wait, because a command with a long output waits for its reader.
    let (mut stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let stdout = std::thread::spawn(move || std::io::read_to_string(&mut stdout).unwrap());
    let stderr = std::thread::spawn(move || std::io::read_to_string(&mut stderr).unwrap());
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("ringway {arguments:?} does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    (status.code(), stdout.join().unwrap(), stderr.join().unwrap())
}

/// Whether a process exists and is not a zombie.
pub(crate) fn is_alive(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next()).is_some_and(|state| state != "Z")
}
