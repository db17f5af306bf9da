//! A writer that blocks nobody. Lines wait in a queue for a thread that writes them. A line that does not fit into the
//! queue is dropped and counted.
//!
//! `tracing-appender` offers the same, but its guard prints to standard output when the queue is full at the end of the
//! program. That blocks, or panics, exactly when nobody reads the output.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

/// Longest wait for the queue to be written at the end of the program.
const FINISH: Duration = Duration::from_secs(1);

/// Where lines go.
pub type Sink = Box<dyn Write + Send>;

/// A queue of lines, and the thread that writes them to a sink. Dropping it lets the thread write the rest and end.
#[derive(Debug)]
pub struct LossyWriter {
    queue: SyncSender<Message>,
    lost: LostLines,
}

enum Message {
    Line(Vec<u8>),
    Replace(Sink),
    /// Everything before this message has been written when the answer arrives.
    Finish(SyncSender<()>),
}

/// Counts lines that did not reach a log. Clones share one counter.
#[derive(Debug, Clone, Default)]
pub struct LostLines(Arc<AtomicU64>);

impl LostLines {
    /// Lines lost because the queue was full or a write failed.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl LossyWriter {
    /// Starts the thread `name`, which writes to `sink`. At most `most` lines wait in the queue. `lost` counts the lines
    /// that are lost.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(name: &str, most: usize, sink: Sink, lost: LostLines) -> io::Result<Self> {
        let (queue, messages) = sync_channel(most);
        let counter = lost.clone();
        let name = name.to_owned();
        std::thread::Builder::new().name(name.clone()).spawn(move || write_all(&name, &messages, sink, &counter))?;
        Ok(Self { queue, lost })
    }

    /// Queues a line, or drops and counts it.
    pub fn write(&self, line: Vec<u8>) {
        if self.queue.try_send(Message::Line(line)).is_err() {
            self.lost.add();
        }
    }

    /// Writes later lines to another sink. Returns whether it will: not while the queue is full.
    pub fn replace(&self, sink: Sink) -> bool {
        self.queue.try_send(Message::Replace(sink)).is_ok()
    }

    /// Waits until the queue has been written, for at most one second.
    pub fn finish(&self) {
        let deadline = Instant::now() + FINISH;
        let (done, is_done) = sync_channel(1);
        let mut message = Message::Finish(done);
        // A full queue may have room again soon.
        while let Err(TrySendError::Full(again)) = self.queue.try_send(message) {
            if Instant::now() >= deadline {
                return;
            }
            message = again;
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = is_done.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    }

    /// The counter of lost lines.
    pub fn lost(&self) -> &LostLines {
        &self.lost
    }
}

fn write_all(name: &str, messages: &Receiver<Message>, mut sink: Sink, lost: &LostLines) {
    let mut has_failed = false;
    for message in messages {
        match message {
            Message::Line(line) => {
                if let Err(error) = sink.write_all(&line).and_then(|()| sink.flush()) {
                    lost.add();
                    if !std::mem::replace(&mut has_failed, true) {
                        tracing::error!(log = name, %error, "cannot write to a log; lost lines are counted");
                    }
                }
            }
            Message::Replace(other) => (sink, has_failed) = (other, false),
            // The caller may have given up.
            Message::Finish(done) => drop(done.try_send(())),
        }
    }
}

/// Opens a file for appending. Never waits for the reader of a FIFO: the lines wait in the FIFO until there is one.
///
/// # Errors
/// When the file cannot be opened.
pub fn append(path: &Path) -> io::Result<std::fs::File> {
    use std::os::unix::fs::FileTypeExt as _;

    // Opening a FIFO for writing alone blocks until a reader opens it (fifo(7)).
    let is_fifo = path.metadata().is_ok_and(|file| file.file_type().is_fifo());
    let mut options = std::fs::OpenOptions::new();
    if is_fifo { options.read(true).write(true) } else { options.create(true).append(true) }.open(path)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn a_stalled_sink_blocks_nobody_and_its_lost_lines_are_counted() {
        let (mut reader, pipe) = io::pipe().unwrap();
        let writer = LossyWriter::start("test", 8, Box::new(pipe), LostLines::default()).unwrap();
        // A pipe of 64 KiB holds 16 such lines.
        let line = vec![b'x'; 4096];
        let began = Instant::now();
        for _ in 0..100 {
            writer.write(line.clone());
        }
        writer.finish();
        assert!(began.elapsed() < Duration::from_secs(30), "the writer waits for its reader");
        let lost = writer.lost().count();
        assert!((70..100).contains(&lost), "{lost}");
        drop(writer);
        let mut text = Vec::new();
        reader.read_to_end(&mut text).unwrap();
        assert_eq!(text.len() as u64, (100 - lost) * 4096, "every line is either written or counted");
    }

    #[test]
    fn a_line_goes_to_the_sink_of_its_time() {
        let (mut one, first) = io::pipe().unwrap();
        let (mut two, second) = io::pipe().unwrap();
        let writer = LossyWriter::start("test", 8, Box::new(first), LostLines::default()).unwrap();
        writer.write(b"before\n".to_vec());
        assert!(writer.replace(Box::new(second)));
        writer.write(b"after\n".to_vec());
        writer.finish();
        drop(writer);
        let (mut before, mut after) = (String::new(), String::new());
        one.read_to_string(&mut before).unwrap();
        two.read_to_string(&mut after).unwrap();
        assert_eq!((before.as_str(), after.as_str()), ("before\n", "after\n"));
    }
}
