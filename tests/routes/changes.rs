//! Reloads and upgrades of routes.

use super::*;
use crate::harness::program::Program;
use crate::harness::{Random, seed};

#[tokio::test]
async fn a_reload_of_routes_resets_nobody() {
    const POOLS: [&str; 3] = ["a", "b", "c"];
    let servers = servers(&POOLS).await;
    let variants = [
        "    routes: [{ sni: [x.example], pool: a }, { sni: [y.example], pool: b }]\n    pool: c\n",
        "    routes: [{ sni: [y.example], pool: b }, { sni: [x.example], pool: b, name: x }]\n    pool: c\n",
        "    deny: [203.0.113.0/24]\n    pool: b\n",
        "    routes: [{ from: [127.0.0.1], pool: a }]\n    allow: [127.0.0.0/8]\n    pool: reset\n",
        "    proxy_protocol: { from: [10.0.0.0/8] }\n    routes: [{ tls: true, pool: c }]\n    pool: a\n",
    ];
    let yaml = |n: usize| routed(variants[n], &POOLS, &servers, "health_check: { kind: none }, drain: 1m");
    let ringway = Arc::new(Ringway::start(&yaml(0)).await);
    let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let clients: Vec<_> = (0..8)
        .map(|n| {
            let (over, web) = (Arc::clone(&over), ringway.web());
            tokio::spawn(async move {
                let hello = client_hello(["x.example", "y.example", ""][n % 3], &[]);
                let mut long = TcpStream::connect(web).await.unwrap();
                long.write_all(&hello).await.unwrap();
                let first = answer(&mut long, &hello).await;
                let mut count = 0;
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    let mut short = TcpStream::connect(web).await.unwrap();
                    short.write_all(&hello).await.unwrap();
                    answer(&mut short, &hello).await;
                    assert!(soon("an echo", echoes(&mut long)).await, "a reload reset a connection of {first}");
                    count += 1;
                }
                count
            })
        })
        .collect();
    let mut random = Random(seed());
    for _ in 0..30 {
        ringway.reload(&yaml(random.below(variants.len()))).await.unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    over.store(true, std::sync::atomic::Ordering::Relaxed);
    for client in clients {
        assert!(client.await.unwrap() > 0);
    }
    let refused: u64 = ringway::labels::Label::ALL.iter().map(|&reason| stats(&ringway).refused(reason)).sum();
    assert_eq!(refused, 0);
    // The order of routes is a change, although they are the same.
    let order = "    routes: [{ sni: [y.example], pool: b }, { sni: [x.example], pool: a }]\n    pool: c\n";
    ringway.reload(&yaml(0)).await.unwrap();
    let report =
        ringway.reload(&routed(order, &POOLS, &servers, "health_check: { kind: none }, drain: 1m")).await.unwrap();
    assert_eq!(report.changes, ["listeners[web].routes: order: a, b -> b, a"]);
}

#[tokio::test]
async fn routes_and_lists_survive_an_upgrade() {
    const POOLS: [&str; 2] = ["a", "b"];
    let servers = servers(&POOLS).await;
    let denied = crate::harness::program::file("203.0.113.0/24\n");
    let routes = format!(
        "    deny: {{ file: {} }}\n    proxy_protocol: {{ from: [127.0.0.1], required: false, timeout: 3s }}\n\
         \x20   routes: [{{ sni: [a.example], pool: a }}]\n    pool: b\n",
        denied.path().display()
    );
    let mut program =
        Program::start(&routed(&routes, &POOLS, &servers, "health_check: { kind: none }, drain: 1m")).await;
    let web = program.web();
    let hello = client_hello("a.example", &[]);
    let mut long = TcpStream::connect(web).await.unwrap();
    long.write_all(&hello).await.unwrap();
    assert_eq!(answer(&mut long, &hello).await, 'a');
    program.upgrade().await;
    assert!(soon("an echo", echoes(&mut long)).await);
    for (source, is_denied) in [("203.0.113.7:1", true), ("198.51.100.7:1", false)] {
        let ends = Ends { source: source.parse().unwrap(), destination: "203.0.113.1:443".parse().unwrap() };
        let mut stream = TcpStream::connect(web).await.unwrap();
        stream.write_all(&[write(Version::V1, Some(ends)), hello.clone()].concat()).await.unwrap();
        if is_denied {
            is_reset(&mut stream).await;
        } else {
            assert_eq!(answer(&mut stream, &hello).await, 'a');
        }
    }
    let metrics = crate::harness::get(program.api(), "/metrics").await.1;
    assert_eq!(crate::harness::metric_in(&metrics, "ringway_connections_refused_total", &["denied"]), 1.0);
    drop(long);
    eventually_async("the old process ends", async || program.ended().await.code() == Some(0)).await;
}
