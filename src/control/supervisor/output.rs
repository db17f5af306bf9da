//! Logs the standard output and standard error of replicas, line by line, with the slot's name.
//!
//! A replica may write without end. Ringway then logs some of its lines, counts the others, and reads more slowly, so
//! that the replica takes little CPU time of Ringway's.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::text::printable;

/// Longest line in bytes; a longer line is split.
const LONGEST: usize = 8 * 1024;

/// Lines of a replica that are logged in each [`WINDOW`]; further ones are counted.
const LINES: u32 = 200;

/// Time after which the count of lines starts again.
const WINDOW: Duration = Duration::from_secs(1);

/// Bytes that are read at once while lines are not logged: as many as a pipe holds.
const FLOOD: usize = 64 * 1024;

/// Pause after each of these reads. The replica can write 6 MiB per second, and waits beyond that.
const PAUSE: Duration = Duration::from_millis(10);

/// The last lines of a replica's output.
#[derive(Debug, Clone, Default)]
pub(super) struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Tail {
    /// The lines, oldest first.
    pub(super) fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    fn push(&self, line: &str) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == super::LAST_LINES {
            lines.pop_front();
        }
        lines.push_back(line.to_owned());
    }
}

/// Counts the lines of one window of time. Pure.
#[derive(Debug)]
struct Window {
    since: Instant,
    logged: u32,
    dropped: u64,
}

impl Window {
    fn new(now: Instant) -> Self {
        Self { since: now, logged: 0, dropped: 0 }
    }

    /// Whether to log one more line.
    fn admits(&mut self) -> bool {
        let admitted = self.logged < LINES;
        if admitted {
            self.logged += 1;
        } else {
            self.dropped += 1;
        }
        admitted
    }

    fn end(&self) -> Instant {
        self.since + WINDOW
    }

    /// Starts the next window if this one is over. Returns the number of lines that this one dropped.
    fn renew(&mut self, now: Instant) -> Option<u64> {
        let is_over = now >= self.end();
        let dropped = self.dropped;
        if is_over {
            *self = Self::new(now);
        }
        Some(dropped).filter(|&dropped| is_over && dropped > 0)
    }
}

/// Logs the lines of `stream` until it ends. Reports the lines that it did not log to `dropped`. Bytes that are not UTF-8
/// are replaced.
pub(super) async fn log_lines(
    slot: Arc<str>,
    tail: Tail,
    mut stream: impl AsyncRead + Unpin,
    dropped: impl Fn(&str, u64),
) {
    let report = |lines| {
        tracing::warn!(slot = %slot, lines, "output of a replica was not logged: it writes too many lines");
        dropped(&slot, lines);
    };
    let mut pending: Vec<u8> = Vec::new();
    let mut buffer = vec![0; LONGEST];
    let mut window = Window::new(Instant::now());
    loop {
        let read = if window.dropped > 0 {
            // The replica may be silent from now on.
            tokio::time::timeout_at(window.end().into(), stream.read(&mut buffer)).await.ok()
        } else {
            Some(stream.read(&mut buffer).await)
        };
        if let Some(lines) = window.renew(Instant::now()) {
            report(lines);
        }
        let Some(read) = read else { continue };
        let read = read.unwrap_or(0);
        pending.extend_from_slice(&buffer[..read]);
        let (lines, rest) = split(&pending, read == 0);
        let last = lines.len().saturating_sub(super::LAST_LINES);
        for (n, line) in lines.into_iter().enumerate() {
            if line.trim_ascii().is_empty() {
                continue;
            }
            let is_logged = window.admits();
            if is_logged || n >= last {
                let line = printable(String::from_utf8_lossy(line).trim_end());
                if is_logged {
                    tracing::info!(target: "ringway::replica", slot = %slot, "{line}");
                }
                tail.push(&line);
            }
        }
        pending.drain(..pending.len() - rest);
        if read == 0 {
            if window.dropped > 0 {
                report(window.dropped);
            }
            return;
        }
        let is_flooding = window.dropped > 0;
        buffer.resize(if is_flooding { FLOOD } else { LONGEST }, 0);
        if is_flooding {
            tokio::time::sleep(PAUSE).await;
        } else {
            buffer.shrink_to_fit();
        }
    }
}

/// The complete lines in `bytes`, and the length of the rest.
fn split(bytes: &[u8], is_last: bool) -> (Vec<&[u8]>, usize) {
    let (mut lines, mut rest) = (Vec::new(), bytes);
    while let Some(end) = line_end(rest, is_last) {
        let (line, after) = rest.split_at(end);
        lines.push(line);
        rest = after;
    }
    (lines, rest.len())
}

/// The length of the first line in `bytes`; `None` if the line is incomplete.
fn line_end(bytes: &[u8], is_last: bool) -> Option<usize> {
    let newline = bytes.iter().take(LONGEST).position(|&byte| byte == b'\n').map(|at| at + 1);
    let longest = (bytes.len() >= LONGEST).then_some(LONGEST);
    let last = (is_last && !bytes.is_empty()).then_some(bytes.len());
    newline.or(longest).or(last)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    fn lines(bytes: &[u8]) -> Vec<usize> {
        split(bytes, true).0.into_iter().map(<[u8]>::len).collect()
    }

    #[tokio::test]
    async fn the_last_lines_are_kept() {
        let tail = Tail::default();
        let lines: Vec<_> = (1..=super::super::LAST_LINES + 2).map(|n| format!("line {n}")).collect();
        let text = lines.join("\n");
        log_lines("echo-1".into(), tail.clone(), text.as_bytes(), |_, _| {}).await;
        let lines = tail.lines();
        assert_eq!((lines.len(), lines[0].as_str()), (super::super::LAST_LINES, "line 3"));
    }

    #[tokio::test]
    async fn a_flood_is_counted_and_its_last_lines_are_kept() {
        const WRITTEN: u64 = 100_000;
        let (tail, dropped) = (Tail::default(), AtomicU64::new(0));
        let text: String = (1..=WRITTEN).fold(String::new(), |text, n| text + &n.to_string() + "\n");
        let count = |_: &str, lines| {
            dropped.fetch_add(lines, Ordering::Relaxed);
        };
        log_lines("echo-1".into(), tail.clone(), text.as_bytes(), count).await;
        // The test may take longer than a window.
        let logged = WRITTEN - dropped.load(Ordering::Relaxed);
        assert!(logged >= LINES.into() && logged < WRITTEN / 2, "{logged}");
        assert_eq!(tail.lines().last().unwrap(), "100000");
        assert_eq!(tail.lines()[0], "99991");
    }

    #[test]
    fn each_window_admits_its_lines_and_reports_the_others() {
        let begin = Instant::now();
        let mut window = Window::new(begin);
        assert_eq!((0..LINES + 5).filter(|_| window.admits()).count(), LINES as usize);
        assert_eq!(window.renew(begin + WINDOW / 2), None);
        assert_eq!(window.renew(begin + WINDOW), Some(5));
        assert!(window.admits());
        assert_eq!(window.renew(begin + 2 * WINDOW), None, "nothing was dropped");
    }

    #[test]
    fn lines_end_at_newlines_at_the_limit_and_at_the_end() {
        assert_eq!(lines(b"one\ntwo\n\nthree"), [4, 4, 1, 5]);
        assert_eq!(lines(&[b'x'; LONGEST + 5]), [LONGEST, 5]);
        assert_eq!(line_end(b"half a li", false), None);
    }
}
