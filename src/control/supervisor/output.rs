//! Logs the standard output and standard error of replicas, line by line, with the slot's name.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncRead, AsyncReadExt as _};

/// Longest line in bytes; a longer line is split.
const LONGEST: usize = 8 * 1024;

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

/// Logs every line of `stream` until it ends. Bytes that are not UTF-8 are replaced.
pub(super) async fn log_lines(slot: Arc<str>, tail: Tail, mut stream: impl AsyncRead + Unpin) {
    let mut pending: Vec<u8> = Vec::new();
    let mut buffer = vec![0; LONGEST];
    loop {
        let read = stream.read(&mut buffer).await.unwrap_or(0);
        pending.extend_from_slice(&buffer[..read]);
        let mut rest = pending.as_slice();
        while let Some(end) = line_end(rest, read == 0) {
            let (line, after) = rest.split_at(end);
            let line = String::from_utf8_lossy(line);
            if !line.trim().is_empty() {
                tracing::info!(target: "ringway::replica", slot = %slot, "{}", line.trim_end());
                tail.push(line.trim_end());
            }
            rest = after;
        }
        pending = rest.to_vec();
        if read == 0 {
            return;
        }
    }
}

/// The length of the first line in `bytes`; `None` if the line is incomplete.
fn line_end(bytes: &[u8], is_last: bool) -> Option<usize> {
    let newline = bytes.iter().position(|&byte| byte == b'\n').map(|at| at + 1);
    let longest = (bytes.len() >= LONGEST).then_some(LONGEST);
    let last = (is_last && !bytes.is_empty()).then_some(bytes.len());
    newline.filter(|&at| at <= LONGEST).or(longest).or(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(mut bytes: &[u8]) -> Vec<usize> {
        let mut lengths = Vec::new();
        while let Some(end) = line_end(bytes, true) {
            lengths.push(end);
            bytes = &bytes[end..];
        }
        lengths
    }

    #[tokio::test]
    async fn the_last_lines_are_kept() {
        let tail = Tail::default();
        let lines: Vec<_> = (1..=super::super::LAST_LINES + 2).map(|n| format!("line {n}")).collect();
        let text = lines.join("\n");
        log_lines("echo-1".into(), tail.clone(), text.as_bytes()).await;
        let lines = tail.lines();
        assert_eq!((lines.len(), lines[0].as_str()), (super::super::LAST_LINES, "line 3"));
    }

    #[test]
    fn lines_end_at_newlines_at_the_limit_and_at_the_end() {
        assert_eq!(lines(b"one\ntwo\n\nthree"), [4, 4, 1, 5]);
        assert_eq!(lines(&[b'x'; LONGEST + 5]), [LONGEST, 5]);
        assert_eq!(line_end(b"half a li", false), None);
    }
}
