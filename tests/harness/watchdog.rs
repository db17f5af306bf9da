//! Watches from outside that the main thread of a Ringway does not block: it may wait only for events.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// The longest time in one system call other than a wait for events. Starting a process takes a part of it on a busy machine.
const LONGEST: Duration = Duration::from_secs(2);

/// Watches a thread until it is dropped, or the thread ends. If the thread blocked, dropping this panics.
pub(crate) struct Watchdog {
    stop: Arc<AtomicBool>,
    watching: Option<JoinHandle<Option<String>>>,
}

/// What a thread does, as the kernel shows it.
#[derive(PartialEq)]
struct Call {
    /// The number of the system call and its arguments, or `running`.
    call: String,
    /// The waits so far. The same number at two looks means the same wait.
    waits: String,
}

impl Call {
    /// `None`: the thread has ended, or this process may not look at it.
    fn of(process: i32, thread: i32) -> Option<Self> {
        let folder = format!("/proc/{process}/task/{thread}");
        let call = std::fs::read_to_string(format!("{folder}/syscall")).ok()?;
        let status = std::fs::read_to_string(format!("{folder}/status")).ok()?;
        let waits = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches"))?.to_owned();
        Some(Self { call, waits })
    }

    /// Whether the thread waits in a system call other than those of the epoll family.
    fn is_blocked(&self) -> bool {
        const EPOLL: [&str; 4] = ["232", "281", "441", "22"];
        let number = self.call.split_whitespace().next().unwrap_or_default();
        number.bytes().all(|byte| byte.is_ascii_digit()) && !EPOLL.contains(&number)
    }
}

impl Watchdog {
    /// Watches a thread. The main thread of a process has the number of the process.
    pub(crate) fn watch(process: i32, thread: i32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let watching = std::thread::spawn(move || {
            let mut since = Instant::now();
            let mut before = Call::of(process, thread)?;
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(LOOK);
                let now = Call::of(process, thread)?;
                if now != before || !now.is_blocked() {
                    (before, since) = (now, Instant::now());
                } else if since.elapsed() > LONGEST {
                    return Some(now.call);
                }
            }
            None
        });
        Self { stop, watching: Some(watching) }
    }

    /// Stops watching. Returns the call in which the thread blocked, if it did.
    fn end(&mut self) -> Option<String> {
        self.stop.store(true, Ordering::Relaxed);
        self.watching.take().and_then(|watching| watching.join().unwrap())
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        if let Some(call) = self.end()
            && !std::thread::panicking()
        {
            panic!("the main thread of Ringway was in one system call for {LONGEST:?}: {call}");
        }
    }
}

#[test]
fn the_watchdog_notices_a_thread_that_blocks_and_no_other() {
    let process = i32::try_from(std::process::id()).unwrap();
    let watch = |work: fn()| {
        let (sender, thread) = std::sync::mpsc::channel();
        let working = std::thread::spawn(move || {
            sender.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
            work();
        });
        let mut watchdog = Watchdog::watch(process, thread.recv().unwrap());
        working.join().unwrap();
        watchdog.end()
    };
    assert!(watch(|| std::thread::sleep(2 * LONGEST)).is_some());
    assert!(watch(|| (0..30).for_each(|_| std::thread::sleep(LONGEST / 10))).is_none(), "many short waits");
    let waits_for_events = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { tokio::time::sleep(2 * LONGEST).await });
    };
    assert!(watch(waits_for_events).is_none());
}
