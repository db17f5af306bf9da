//! Both paths carry every byte, also when a stream switches between them. Each path is used for its kind of traffic.

use std::sync::LazyLock;
use std::time::Duration;

use ringway::stream::Stream;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::JoinSet;

use crate::harness::backends::Server;
use crate::harness::program::Program;
use crate::harness::{Random, Ringway, config, eventually_async, seed, soon, static_config};

const MIB: usize = 1 << 20;

/// Every stream repeats this block of random bytes from its own offset. The length is a prime, so lost, doubled or moved
/// bytes change the stream.
static BLOCK: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut random = Random(1);
    (0..1_048_583).map(|_| random.next().to_le_bytes()[0]).collect()
});

/// `length` bytes of the stream from `at`, up to the block's end.
fn piece(at: usize, length: usize) -> &'static [u8] {
    let from = at % BLOCK.len();
    &BLOCK[from..BLOCK.len().min(from + length)]
}

/// Sends `count` bytes of the stream that begins at `offset` in random slices, then ends it.
async fn send(mut half: WriteHalf<Stream>, offset: usize, count: usize, seed: u64) {
    let mut random = Random(seed);
    let mut sent = 0;
    // Small and large slices take turns, so the relay switches its path and back.
    let mut slices = 0;
    while sent < count {
        let is_small = slices / 40 % 2 == 1;
        slices += 1;
        let most = if is_small { 3_000 } else { 400_000 };
        let slice = piece(offset + sent, (1 + random.below(most)).min(count - sent));
        half.write_all(slice).await.unwrap();
        sent += slice.len();
        if is_small {
            tokio::task::yield_now().await;
        }
    }
    half.shutdown().await.unwrap();
}

/// Reads the stream in random slices and checks its bytes and its end.
async fn receive(mut half: ReadHalf<Stream>, offset: usize, count: usize, seed: u64) {
    let mut random = Random(seed);
    let mut buffer = vec![0; 300_000];
    let mut got = 0;
    loop {
        let room = 1 + random.below(buffer.len());
        let n = half
            .read(&mut buffer[..room])
            .await
            .unwrap_or_else(|error| panic!("after {got} of {count} bytes: {error}"));
        if n == 0 {
            assert_eq!(got, count, "the stream ended early");
            return;
        }
        let mut checked = 0;
        while checked < n {
            let expected = piece(offset + got + checked, n - checked);
            assert!(
                buffer[checked..checked + expected.len()] == *expected,
                "other bytes after {} of {count}",
                got + checked
            );
            checked += expected.len();
        }
        got += n;
        if random.below(50) == 0 {
            tokio::task::yield_now().await;
        }
    }
}

/// The sizes and offsets of one connection. The client sends them to the backend in the first bytes.
#[derive(Clone, Copy)]
struct Order {
    up: usize,
    down: usize,
    seed: u64,
}

impl Order {
    fn random(random: &mut Random) -> Self {
        // Most sizes are small, up to 8 MiB. Each halving of the range has the same probability.
        let size = |random: &mut Random| {
            let scale = random.below(16);
            random.below((8 * MIB) >> scale)
        };
        Self { up: size(random), down: size(random), seed: random.next() }
    }

    fn to_bytes(self) -> Vec<u8> {
        [self.up as u64, self.down as u64, self.seed].iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    async fn read(stream: &mut Stream) -> Self {
        let up = stream.read_u64_le().await.unwrap() as usize;
        let down = stream.read_u64_le().await.unwrap() as usize;
        Self { up, down, seed: stream.read_u64_le().await.unwrap() }
    }

    fn offsets(self) -> (usize, usize) {
        (self.seed as usize % BLOCK.len(), (self.seed >> 32) as usize % BLOCK.len())
    }
}

async fn exchange(stream: Stream, order: Order, is_client: bool) {
    let (from, to) = tokio::io::split(stream);
    let (up, down) = order.offsets();
    if is_client {
        tokio::join!(send(to, up, order.up, order.seed), receive(from, down, order.down, order.seed ^ 1));
    } else {
        tokio::join!(send(to, down, order.down, order.seed ^ 2), receive(from, up, order.up, order.seed ^ 3));
    }
}

/// The families of the two sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Families {
    Tcp,
    Unix,
    UnixToBackends,
}

/// A backend's socket of either family.
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Runs a backend. Its failures fail the test.
async fn serve(listener: Listener, connections: usize) {
    let mut exchanges = JoinSet::new();
    for _ in 0..connections {
        let mut stream = match &listener {
            Listener::Tcp(listener) => Stream::Tcp(listener.accept().await.unwrap().0),
            Listener::Unix(listener) => Stream::Unix(listener.accept().await.unwrap().0),
        };
        exchanges.spawn(async move {
            let order = Order::read(&mut stream).await;
            exchange(stream, order, false).await;
        });
    }
    while let Some(exchange) = exchanges.join_next().await {
        exchange.unwrap();
    }
}

/// Carries out the orders, 24 at a time, through a Ringway with these settings of `relay`.
async fn carry_out(relay: &str, families: Families, orders: Vec<Order>) -> Ringway {
    let folder = tempfile::tempdir().unwrap();
    let [web, server] = ["web", "server"].map(|name| folder.path().join(name));
    let (listener, address) = if families == Families::Tcp {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        (Listener::Tcp(listener), address)
    } else {
        (Listener::Unix(UnixListener::bind(&server).unwrap()), format!("unix:{}", server.display()))
    };
    let mut yaml = config(&format!("static: [{{ address: \"{address}\" }}]"), "", "health_check: { kind: none }");
    if families == Families::Unix {
        yaml = yaml.replace("listen: 127.0.0.1:0", &format!("listen: unix:{}", web.display()));
    }
    let ringway = Ringway::start(&format!("relay: {relay}\n{yaml}")).await;
    let backend = tokio::spawn(serve(listener, orders.len()));
    let mut clients = JoinSet::new();
    for order in orders {
        if clients.len() == 24 {
            clients.join_next().await.unwrap().unwrap();
        }
        let (address, path) = (ringway.state().listeners[0].address.ip(), web.clone());
        clients.spawn(async move {
            let mut stream = match address {
                Some(address) => Stream::Tcp(TcpStream::connect(address).await.unwrap()),
                None => Stream::Unix(UnixStream::connect(path).await.unwrap()),
            };
            stream.write_all(&order.to_bytes()).await.unwrap();
            soon("an exchange", exchange(stream, order, true)).await;
        });
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    soon("the backend", backend).await.unwrap();
    ringway
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn splicing_carries_every_byte_of_thousands_of_connections() {
    let mut random = Random(seed());
    let mut list: Vec<_> = (0..2000).map(|_| Order::random(&mut random)).collect();
    list.extend((0..3).map(|_| Order { up: 64 * MIB, down: 64 * MIB, seed: random.next() }));
    let ringway = carry_out("{ splice: true }", Families::Tcp, list).await;
    for path in ["path=\"copied\"", "path=\"spliced\""] {
        assert!(ringway.metric("ringway_bytes_total", &[path]).await > MIB as f64, "{path}: not used");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copying_carries_every_byte_of_thousands_of_connections() {
    let mut random = Random(seed());
    let mut list: Vec<_> = (0..1000).map(|_| Order::random(&mut random)).collect();
    list.extend((0..2).map(|_| Order { up: 64 * MIB, down: 64 * MIB, seed: random.next() }));
    let ringway = carry_out("{ splice: false }", Families::Tcp, list).await;
    assert_eq!(ringway.metric("ringway_bytes_total", &["path=\"spliced\""]).await, 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unix_sockets_carry_every_byte_on_both_paths() {
    for families in [Families::Unix, Families::UnixToBackends] {
        let mut random = Random(seed());
        let mut list: Vec<_> = (0..500).map(|_| Order::random(&mut random)).collect();
        list.push(Order { up: 64 * MIB, down: 64 * MIB, seed: random.next() });
        let ringway = carry_out("{ splice: true }", families, list.clone()).await;
        for path in ["path=\"copied\"", "path=\"spliced\""] {
            assert!(
                ringway.metric("ringway_bytes_total", &[path]).await > MIB as f64,
                "{families:?}, {path}: not used"
            );
        }
        carry_out("{ splice: false }", families, list).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_is_spliced_and_small_messages_are_not() {
    let order = Order { up: 0, down: 1024 * MIB, seed: 5 };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let yaml = static_config(&[listener.local_addr().unwrap()], "health_check: { kind: none }");
    let ringway = Ringway::start(&yaml).await;
    let backend = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut sent = 0;
        while sent < order.down {
            let slice = piece(sent, 512 * 1024);
            let slice = &slice[..slice.len().min(order.down - sent)];
            stream.write_all(slice).await.unwrap();
            sent += slice.len();
        }
    });
    let mut client = TcpStream::connect(ringway.web()).await.unwrap();
    let mut buffer = vec![0; 512 * 1024];
    let mut got = 0;
    loop {
        match soon("a read", client.read(&mut buffer)).await.unwrap() {
            0 => break,
            n => got += n,
        }
    }
    assert_eq!(got, order.down);
    drop(client);
    backend.await.unwrap();
    let down = "direction=\"to_client\"";
    eventually_async("all accounted for", async || {
        ringway.metric("ringway_bytes_total", &[down]).await == order.down as f64
    })
    .await;
    let spliced = ringway.metric("ringway_bytes_total", &[down, "path=\"spliced\""]).await;
    assert!(spliced > 0.9 * order.down as f64, "{spliced} of {}", order.down);

    let echo = Server::echo("a").await;
    let ringway = Ringway::start(&static_config(&[echo.address], "health_check: { kind: none }")).await;
    let mut client = TcpStream::connect(ringway.web()).await.unwrap();
    let message = piece(0, 4096);
    for _ in 0..2000 {
        client.write_all(message).await.unwrap();
        soon("the echo", client.read_exact(&mut buffer[..message.len()])).await.unwrap();
    }
    drop(client);
    eventually_async("all accounted for", async || {
        ringway.metric("ringway_bytes_total", &[]).await == 2.0 * 2000.0 * 4096.0
    })
    .await;
    assert_eq!(ringway.metric("ringway_bytes_total", &["path=\"spliced\""]).await, 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_fewer_pipes_than_streams_transfers_still_finish() {
    // On a busy machine, two streams of a worker may never splice at the same time.
    for _ in 0..20 {
        let list = (0..24).map(|seed| Order { up: 8 * MIB, down: 8 * MIB, seed }).collect();
        let ringway = carry_out("{ max_pipes: 2 }", Families::Tcp, list).await;
        if ringway.metric("ringway_splice_pipe_shortages_total", &[]).await > 0.0 {
            return;
        }
    }
    panic!("no stream found all pipes taken");
}

/// The backend sends without end and the clients do not read. The bytes wait in the kernel and not in Ringway.
#[tokio::test]
async fn slow_readers_do_not_grow_the_memory() {
    const READERS: u64 = 60;
    let torrent =
        Server::start(|mut stream| async move { while stream.write_all(piece(0, 256 * 1024)).await.is_ok() {} }).await;
    for splice in [true, false] {
        let yaml = static_config(&[torrent.address], "health_check: { kind: none }");
        let program = Program::start(&format!("relay: {{ splice: {splice} }}\n{yaml}")).await;
        let before = program.memory();
        let readers = loadtest::open(program.web(), READERS as usize).await.unwrap();
        let mut last = -1.0;
        eventually_async("the streams are stuck", async || {
            // A stream that still moves would change the metric in this time.
            tokio::time::sleep(Duration::from_millis(1200)).await;
            let text = crate::harness::get(program.api(), "/metrics").await.1;
            let moved = crate::harness::metric_in(&text, "ringway_bytes_total", &[]);
            let is_stuck = moved > 0.0 && moved == last;
            last = moved;
            is_stuck
        })
        .await;
        let grown = program.memory().saturating_sub(before);
        // Each stream holds at most 64 KiB. The rest is room for the allocator.
        assert!(grown < READERS * 80 * 1024 + 4 * MIB as u64, "splice {splice}: {grown} bytes");
        drop(readers);
    }
}
