//! Times a request through the relay, and a connection from its accept to its account. The bench is both the client and
//! the backend, so the time covers one worker and the kernel's loopback.
//!
//! `cargo bench --bench relay`

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use ringway::app::{App, Environment, Inheritance};
use ringway::config::{Config, Source};

fn main() {
    divan::main();
}

/// Starts Ringway with one worker in front of `backend`. It runs until the process ends.
fn ringway(backend: SocketAddr, access_log: &str) -> SocketAddr {
    let yaml = format!(
        "workers: 1\napi: {{ listen: \"127.0.0.1:0\" }}\n{access_log}\n\
         listeners: [{{ name: web, listen: \"127.0.0.1:0\", pool: web }}]\n\
         pools: [{{ name: web, provider: {{ static: [{{ address: \"{backend}\" }}] }}, health_check: {{ kind: none }} }}]"
    );
    let config = Config::parse(&yaml, "bench").expect("the config is valid");
    let environment = Environment {
        source: Source::BuiltIn,
        token: None,
        arguments: Vec::new(),
        executable: PathBuf::from("ringway"),
        replica_open_files: None,
        docker_host: None,
        log_lost: None,
        events: std::sync::Arc::default(),
        log_filter: None,
    };
    let (told, address) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let app = App::start(config, environment, Inheritance::default()).await.expect("the app starts");
            let address = app.state().view().listeners[0].address.ip();
            told.send(address.expect("it listens on TCP")).expect("the bench waits");
            app.run(std::future::pending()).await.expect("the app runs");
        });
    });
    address.recv().expect("the app listens")
}

/// Opens a connection through Ringway and returns the client's end and the backend's end.
fn ends(backend: &TcpListener, address: SocketAddr) -> (TcpStream, TcpStream) {
    let mut client = TcpStream::connect(address).expect("Ringway listens");
    client.set_nodelay(true).expect("it is open");
    client.write_all(b"x").expect("it is open");
    let mut server = backend.accept().expect("Ringway connects").0;
    server.set_nodelay(true).expect("it is open");
    server.read_exact(&mut [0]).expect("a byte comes");
    (client, server)
}

/// Sends this number of bytes to the backend, and the same number back.
#[divan::bench(args = [100, 4096, 65536])]
fn request(bencher: Bencher, bytes: usize) {
    let backend = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = ringway(backend.local_addr().expect("it listens"), "");
    let (mut client, mut server) = ends(&backend, address);
    let (message, mut buffer) = (vec![1; bytes], vec![0; bytes]);
    bencher.counter(BytesCount::new(2 * bytes)).bench_local(|| {
        client.write_all(&message).expect("it is open");
        server.read_exact(&mut buffer).expect("it comes");
        server.write_all(&message).expect("it is open");
        client.read_exact(&mut buffer).expect("it comes");
    });
}

/// Times accept, pick, connect, one byte, both ends and the account, with and without an access log.
#[divan::bench(args = ["", "access_log: { path: /dev/null }"])]
fn connection(bencher: Bencher, access_log: &str) {
    let backend = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = ringway(backend.local_addr().expect("it listens"), access_log);
    bencher.counter(ItemsCount::new(1_usize)).bench_local(|| {
        let (client, mut server) = ends(&backend, address);
        drop(client);
        assert_eq!(server.read(&mut [0]).expect("an end comes"), 0);
    });
}
