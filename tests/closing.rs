//! The relay passes on the end of a stream: FIN becomes FIN after all earlier bytes, RST becomes RST, and a clean end
//! never becomes RST. Each case runs in both directions, on the copy path and on the splice path. Clean ends also run with
//! Unix sockets on both sides, which have no RST: see `unix.rs`.

use std::io;

use ringway::stream::Stream;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::harness::{Ringway, config, eventually_async, soon};

const MIB: usize = 1 << 20;

/// The two ends of a connection through Ringway.
struct Line {
    ringway: Ringway,
    near: Stream,
    far: Stream,
}

/// The end that acts first, and the path of its direction at that moment.
#[derive(Debug, Clone, Copy)]
struct Case {
    client_first: bool,
    spliced: bool,
    /// Both sides have Unix sockets.
    is_unix: bool,
}

const CASES: [Case; 4] = [
    Case { client_first: true, spliced: false, is_unix: false },
    Case { client_first: true, spliced: true, is_unix: false },
    Case { client_first: false, spliced: false, is_unix: false },
    Case { client_first: false, spliced: true, is_unix: false },
];

/// The cases on both families.
fn all_cases() -> impl Iterator<Item = Case> {
    CASES.into_iter().flat_map(|case| [case, Case { is_unix: true, ..case }])
}

impl Line {
    /// Opens a connection. `near` is the end that acts first.
    async fn new(case: Case, pool: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let [web, server] = ["web", "server"].map(|name| folder.path().join(name));
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let unix = UnixListener::bind(&server).unwrap();
        let address =
            if case.is_unix { format!("unix:{}", server.display()) } else { tcp.local_addr().unwrap().to_string() };
        let pool = format!("health_check: {{ kind: none }}\n{pool}");
        let mut yaml = config(&format!("static: [{{ address: \"{address}\" }}]"), "", &pool);
        if case.is_unix {
            yaml = yaml.replace("listen: 127.0.0.1:0", &format!("listen: unix:{}", web.display()));
        }
        let ringway = Ringway::start(&format!("relay: {{ splice: {} }}\n{yaml}", case.spliced)).await;
        let (client, backend) = if case.is_unix {
            let client = Stream::Unix(UnixStream::connect(&web).await.unwrap());
            (client, Stream::Unix(soon("the backend's accept", unix.accept()).await.unwrap().0))
        } else {
            let client = Stream::Tcp(TcpStream::connect(ringway.web()).await.unwrap());
            (client, Stream::Tcp(soon("the backend's accept", tcp.accept()).await.unwrap().0))
        };
        let (near, far) = if case.client_first { (client, backend) } else { (backend, client) };
        let mut line = Self { ringway, near, far };
        if case.spliced {
            // A busy machine may divide the stream into small reads.
            let mut streams = 0;
            while line.ringway.metric("ringway_splice_pipes", &[]).await == 0.0 {
                streams += 1;
                assert!(streams < 20, "{case:?}: not spliced");
                line.stream(16 * MIB).await;
            }
        }
        line
    }

    /// Sends `count` bytes from the near to the far end.
    async fn stream(&mut self, count: usize) {
        let (near, far) = (&mut self.near, &mut self.far);
        let sent = async { near.write_all(&vec![7; count]).await.unwrap() };
        let received = async { far.read_exact(&mut vec![0; count]).await.unwrap() };
        soon("a stream", async { tokio::join!(sent, received) }).await;
    }

    async fn ends_as(&self, reason: &str) {
        let label = format!("reason=\"{reason}\"");
        eventually_async(reason, async || {
            self.ringway.metric("ringway_connections_ended_total", &[&label]).await == 1.0
        })
        .await;
    }
}

/// Reads until the end. Returns the number of bytes and the result of the last read.
async fn read_all(stream: &mut Stream) -> (usize, io::Result<()>) {
    let mut buffer = vec![0; 256 * 1024];
    let mut count = 0;
    loop {
        match soon("a read", stream.read(&mut buffer)).await {
            Ok(0) => return (count, Ok(())),
            Ok(n) => count += n,
            Err(error) => return (count, Err(error)),
        }
    }
}

fn reset(stream: Stream) {
    stream.reset_on_close();
    drop(stream);
}

fn is_reset(end: &io::Result<()>) -> bool {
    end.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset)
}

#[tokio::test]
async fn the_whole_answer_arrives_after_a_fin() {
    for case in all_cases() {
        let mut line = Line::new(case, "").await;
        line.near.write_all(b"question").await.unwrap();
        line.near.shutdown().await.unwrap();
        let (count, end) = read_all(&mut line.far).await;
        assert!(count == 8 && end.is_ok(), "{case:?}: {count} {end:?}");
        let Line { mut near, mut far, .. } = line;
        let answer = tokio::spawn(async move {
            far.write_all(&vec![9; 50 * MIB]).await.unwrap();
            far.shutdown().await.unwrap();
            far
        });
        let (count, end) = read_all(&mut near).await;
        assert!(count == 50 * MIB && end.is_ok(), "{case:?}: {count} {end:?}");
        drop(answer.await.unwrap());
    }
}

#[tokio::test]
async fn fin_behind_queued_data_waits_for_a_slow_reader() {
    for case in all_cases() {
        let mut line = Line::new(case, "").await;
        // The sender writes more than the sockets hold, and then FIN, before the reader starts.
        let Line { ref mut near, ref mut far, .. } = line;
        let sender = async {
            near.write_all(&vec![5; 12 * MIB]).await.unwrap();
            near.shutdown().await.unwrap();
        };
        let reader = async {
            let mut count = 0;
            let mut piece = vec![0; 64 * 1024];
            loop {
                tokio::task::yield_now().await;
                match far.read(&mut piece).await.unwrap() {
                    0 => return count,
                    n => count += n,
                }
            }
        };
        let ((), count) = soon("a slow reader", async { tokio::join!(sender, reader) }).await;
        assert_eq!(count, 12 * MIB, "{case:?}");
        line.far.shutdown().await.unwrap();
        let (_, end) = read_all(&mut line.near).await;
        assert!(end.is_ok(), "{case:?}: {end:?}");
        line.ends_as("finished").await;
    }
}

#[tokio::test]
async fn a_close_with_queued_data_delivers_all_of_it() {
    for case in all_cases() {
        let mut line = Line::new(case, "").await;
        line.far.shutdown().await.unwrap();
        let (_, end) = read_all(&mut line.near).await;
        assert!(end.is_ok());
        // The last side closes both directions while its data is still queued.
        let Line { mut near, mut far, ringway } = line;
        let closing = tokio::spawn(async move {
            near.write_all(&vec![5; 12 * MIB]).await.unwrap();
            drop(near);
        });
        let (count, end) = read_all(&mut far).await;
        assert!(count == 12 * MIB && end.is_ok(), "{case:?}: {count} {end:?}");
        closing.await.unwrap();
        drop(ringway);
    }
}

#[tokio::test]
async fn a_reset_in_mid_stream_arrives_as_a_reset() {
    for case in CASES {
        let mut line = Line::new(case, "").await;
        line.near.write_all(b"half a sen").await.unwrap();
        line.far.read_exact(&mut [0; 10]).await.unwrap();
        let Line { near, mut far, ringway } = line;
        reset(near);
        let (_, end) = read_all(&mut far).await;
        assert!(is_reset(&end), "{case:?}: {end:?}");
        let reason = if case.client_first { "reason=\"client_reset\"" } else { "reason=\"backend_reset\"" };
        eventually_async(reason, async || ringway.metric("ringway_connections_ended_total", &[reason]).await == 1.0)
            .await;
    }
}

#[tokio::test]
async fn bytes_before_a_reset_are_delivered_before_it() {
    for case in CASES.into_iter().cycle().take(40) {
        let line = Line::new(case, "").await;
        let Line { mut near, mut far, ringway: _ringway } = line;
        // The near end answers without reading its input and closes. The unread input turns the close into a reset.
        // The far end keeps sending, so the relay may get the reset from a write.
        far.write_all(&vec![1; MIB]).await.unwrap();
        near.write_all(b"413 too much").await.unwrap();
        let mut answer = [0; 12];
        soon("the answer", far.read_exact(&mut answer)).await.unwrap();
        soon("unread input", near.ready(tokio::io::Interest::READABLE)).await.unwrap();
        drop(near);
        // A socket reports a reset only once, to the first call.
        let written = soon("a write", far.write_all(&vec![1; MIB])).await;
        let (_, end) = read_all(&mut far).await;
        assert_eq!(&answer, b"413 too much");
        assert!(written.is_err() || end.is_err(), "{case:?}: {end:?}");
    }
}

#[tokio::test]
async fn a_clean_end_is_never_a_reset() {
    for case in all_cases() {
        for _ in 0..5 {
            let mut line = Line::new(case, "").await;
            line.near.write_all(b"bye").await.unwrap();
            line.near.shutdown().await.unwrap();
            let (count, end) = read_all(&mut line.far).await;
            assert!(count == 3 && end.is_ok(), "{case:?}: {end:?}");
            line.far.write_all(b"bye bye").await.unwrap();
            line.far.shutdown().await.unwrap();
            let (count, end) = read_all(&mut line.near).await;
            assert!(count == 7 && end.is_ok(), "{case:?}: {end:?}");
            line.ends_as("finished").await;
            for stream in [&line.near, &line.far] {
                assert!(socket2::SockRef::from(stream).take_error().unwrap().is_none(), "{case:?}");
            }
        }
    }
}

#[tokio::test]
async fn both_sides_may_end_at_once() {
    for case in all_cases() {
        let mut line = Line::new(case, "").await;
        let Line { ref mut near, ref mut far, .. } = line;
        let end = async |stream: &mut Stream| {
            let (mut reader, mut writer) = tokio::io::split(stream);
            let write = async {
                writer.write_all(&vec![3; 3 * MIB]).await.unwrap();
                writer.shutdown().await.unwrap();
            };
            let read = async {
                let mut all = Vec::new();
                reader.read_to_end(&mut all).await.unwrap();
                all.len()
            };
            tokio::join!(write, read).1
        };
        let counts = soon("both ends", async { tokio::join!(end(near), end(far)) }).await;
        assert_eq!(counts, (3 * MIB, 3 * MIB), "{case:?}");
        line.ends_as("finished").await;
    }
}

#[tokio::test]
async fn half_closed_connections_are_reset_after_the_timeout() {
    for case in CASES {
        let mut line = Line::new(case, "timeouts: { idle: 1h, half_closed: 300ms }").await;
        line.near.shutdown().await.unwrap();
        let (_, end) = read_all(&mut line.far).await;
        assert!(end.is_ok());
        // The far end sends nothing and stays open.
        let (_, end) = read_all(&mut line.near).await;
        assert!(is_reset(&end), "{case:?}: {end:?}");
        line.ends_as("half_closed_timeout").await;
        assert_eq!(line.ringway.metric("ringway_connections_active", &[]).await, 0.0);
    }
}

#[tokio::test]
async fn idle_connections_are_reset_and_busy_ones_are_not() {
    let case = CASES[0];
    let mut line = Line::new(case, "timeouts: { idle: 500ms, half_closed: 1h }").await;
    let began = std::time::Instant::now();
    while began.elapsed() < std::time::Duration::from_millis(1500) {
        line.near.write_all(b"x").await.unwrap();
        line.far.read_exact(&mut [0]).await.unwrap();
        // The test sends a byte every 20 ms. A timeout that ignores traffic would reset the connection meanwhile.
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let (_, end) = read_all(&mut line.near).await;
    assert!(is_reset(&end), "{end:?}");
    line.ends_as("idle_timeout").await;
}

/// The half-closed timeout counts only the silence after the FIN.
#[tokio::test]
async fn the_half_closed_timeout_starts_at_the_fin() {
    let case = CASES[0];
    let mut line = Line::new(case, "timeouts: { idle: 1h, half_closed: 1s }").await;
    line.near.write_all(b"question").await.unwrap();
    line.far.read_exact(&mut [0; 8]).await.unwrap();
    // The half-closed timeout would reset the connection in this time if it counted this silence.
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    line.near.shutdown().await.unwrap();
    read_all(&mut line.far).await.1.unwrap();
    // A timeout that counts from before the FIN would reset the connection in this time.
    tokio::time::sleep(std::time::Duration::from_millis(400)).await;
    line.far.write_all(b"answer").await.unwrap();
    line.far.shutdown().await.unwrap();
    let (count, end) = read_all(&mut line.near).await;
    assert!(count == 6 && end.is_ok(), "{count} {end:?}");
}

/// The kernel still delivers its queued bytes after Ringway has given up the connection.
#[tokio::test]
async fn a_slow_reader_gets_every_byte_of_an_ended_stream() {
    for client_first in [true, false] {
        let case = Case { client_first, ..CASES[0] };
        let mut line = Line::new(case, "timeouts: { idle: 1h, half_closed: 300ms }").await;
        line.near.write_all(&vec![6; 300_000]).await.unwrap();
        line.near.shutdown().await.unwrap();
        line.ends_as("half_closed_timeout").await;
        let (count, end) = read_all(&mut line.far).await;
        assert!(count == 300_000 && end.is_ok(), "{case:?}: {count} {end:?}");
        let (_, end) = read_all(&mut line.near).await;
        assert!(is_reset(&end), "{case:?}: {end:?}");
    }
}

/// The relay does not pass on urgent data, but it passes on the bytes after it. Splicing stops at urgent data.
#[tokio::test]
async fn a_stream_continues_after_urgent_data() {
    for case in CASES.into_iter().filter(|case| case.spliced) {
        let line = Line::new(case, "").await;
        let Line { mut near, mut far, ringway: _ringway } = line;
        socket2::SockRef::from(&near).send_out_of_band(b"!").unwrap();
        near.write_all(&[8; 4000]).await.unwrap();
        soon("the bytes after the urgent data", far.read_exact(&mut [0; 4000])).await.unwrap();
        near.shutdown().await.unwrap();
        let (count, end) = read_all(&mut far).await;
        assert!(count == 0 && end.is_ok(), "{case:?}: {count} {end:?}");
    }
}

/// The relay does not read from a side while the other side takes no bytes, so no read reports the reset.
#[tokio::test]
async fn a_reset_is_detected_while_the_other_side_is_stuck() {
    for case in CASES {
        let line = Line::new(case, "").await;
        let Line { mut near, mut far, ringway } = line;
        let piece = vec![1; 64 * 1024];
        let torrent = async { while near.write_all(&piece).await.is_ok() {} };
        // The timeout is the only end, because the far end does not read.
        let _ = tokio::time::timeout(std::time::Duration::from_secs(2), torrent).await;
        reset(near);
        let reason = if case.client_first { "reason=\"client_reset\"" } else { "reason=\"backend_reset\"" };
        eventually_async(reason, async || ringway.metric("ringway_connections_ended_total", &[reason]).await == 1.0)
            .await;
        let (_, end) = read_all(&mut far).await;
        assert!(is_reset(&end), "{case:?}: {end:?}");
    }
}

/// The listener also inspects the first bytes.
#[tokio::test]
async fn a_reset_before_the_first_byte_reaches_no_backend() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let provider = format!("static: [{{ address: \"{}\" }}]", listener.local_addr().unwrap());
    let yaml = config(&provider, "answer_status: true", "health_check: { kind: none }");
    let ringway = Ringway::start(&yaml).await;
    reset(Stream::Tcp(TcpStream::connect(ringway.web()).await.unwrap()));
    let reason = "reason=\"client_reset\"";
    eventually_async(reason, async || ringway.metric("ringway_connections_ended_total", &[reason]).await == 1.0).await;
    assert_eq!(ringway.metric("ringway_connect_attempts_total", &[]).await, 0.0);
}
