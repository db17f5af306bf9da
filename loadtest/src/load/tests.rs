//! Tests of the loads.

use std::collections::HashSet;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::Report;

fn load(target: SocketAddr, work: Work) -> Load {
    Load {
        target,
        sources: 0,
        work,
        protocol: Protocol::Echo,
        connections: 1,
        share: None,
        pace: Pace::Closed,
        duration: Duration::from_secs(1),
        timeout: Duration::from_secs(10),
        precise: false,
    }
}

async fn report(load: &Load) -> Report {
    let report = Arc::new(Mutex::new(Report::default()));
    run(load, &report).await;
    std::mem::take(&mut *report.lock().unwrap())
}

/// Starts a server that runs `serve` for each connection.
async fn server<F>(serve: impl Fn(TcpStream) -> F + Send + Sync + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(serve(stream));
        }
    });
    address
}

/// Echoes, but stalls for half a second after the tenth answer.
async fn stalls(mut stream: TcpStream) {
    let mut buffer = [0; 128];
    for number in 0.. {
        if stream.read_exact(&mut buffer).await.is_err() {
            return;
        }
        if number == 10 {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        let _ = stream.write_all(&buffer).await;
    }
}

#[tokio::test]
async fn an_open_loop_counts_the_stall_for_every_request_that_was_due() {
    let slow =
        |report: &Report| report.outcomes.iter().filter(|outcome| outcome.took > Duration::from_millis(100)).count();
    let closed = report(&load(server(stalls).await, Work::Requests)).await;
    assert!((1..10).contains(&slow(&closed)), "the closed loop stalls too: {}", slow(&closed));
    let open = Load { pace: Pace::Open(100.0), ..load(server(stalls).await, Work::Requests) };
    let open = report(&open).await;
    // These requests were due in the first 400 ms of the stall.
    assert!(slow(&open) >= 30, "{} of {}", slow(&open), open.outcomes.len());
    assert_eq!(open.outcomes.len(), 100, "every request that was due has an outcome");
}

#[tokio::test]
async fn clients_connect_from_the_requested_number_of_addresses() {
    let seen = Arc::new(Mutex::new(HashSet::new()));
    let sink = Arc::clone(&seen);
    let target = server(move |stream| {
        sink.lock().unwrap().insert(stream.peer_addr().unwrap().ip());
        stalls(stream)
    })
    .await;
    let load =
        Load { sources: 3, connections: 7, duration: Duration::from_millis(200), ..load(target, Work::Requests) };
    assert!(report(&load).await.failures().is_empty());
    assert_eq!(seen.lock().unwrap().len(), 3);
}

#[tokio::test]
async fn a_client_works_after_a_request_that_was_dropped() {
    let target = server(stalls).await;
    let mut client = Client::new(target, None, Protocol::Echo);
    {
        // The request is dropped at its first wait, which is the wait for the connection.
        let mut request = std::pin::pin!(client.request());
        let polled = std::future::poll_fn(|cx| std::task::Poll::Ready(request.as_mut().poll(cx))).await;
        assert!(polled.is_pending());
    }
    client.close();
    assert!(client.request().await.is_ok());
}

#[tokio::test]
async fn requests_to_a_silent_target_count_as_failed_without_a_wait_for_each() {
    let silent = server(|stream| async move {
        tokio::time::sleep(Duration::from_secs(60)).await;
        drop(stream);
    });
    let due =
        Load { timeout: Duration::from_millis(300), pace: Pace::Open(200.0), ..load(silent.await, Work::Requests) };
    let began = Instant::now();
    let failures = report(&due).await.failures();
    assert_eq!(failures.values().sum::<usize>(), 200, "{failures:?}");
    assert!(failures["not started in time"] > 150 && began.elapsed() < Duration::from_secs(30), "{failures:?}");
}

#[tokio::test]
async fn generators_that_share_a_load_have_different_clients() {
    let load =
        Arc::new(Load { connections: 2, pace: Pace::Open(10.0), ..load(([127, 0, 0, 1], 1).into(), Work::Requests) });
    let whole = Schedule::of(3, &Arc::new(Load { connections: 4, ..(*load).clone() }));
    let shared = Schedule::of(3, &Arc::new(Load { share: Some((2, 4)), ..(*load).clone() }));
    assert_eq!((whole.next, whole.step), (shared.next, shared.step));
    assert_eq!((whole.next.as_millis(), whole.step.as_millis()), (300, 400));
}

#[tokio::test]
async fn failures_are_counted_by_cause() {
    let silent = server(|stream| async move {
        tokio::time::sleep(Duration::from_secs(60)).await;
        drop(stream);
    });
    let impatient = Load { timeout: Duration::from_millis(100), ..load(silent.await, Work::Requests) };
    assert!(report(&impatient).await.failures().contains_key("no answer in time"));
    let closing = server(|stream| async move { drop(stream) }).await;
    let failures = report(&load(closing, Work::Idle)).await.failures();
    assert_eq!(failures["closed while it was idle"], 1, "{failures:?}");
    let liar = server(|mut stream: TcpStream| async move {
        let mut buffer = [0; 1024];
        while let Ok(1..) = stream.read(&mut buffer).await {
            let _ = stream.write_all(&[7; 1024]).await;
        }
    })
    .await;
    for work in [Work::Requests, Work::Bulk(Direction::Both, 10_000)] {
        let failures = report(&load(liar, work)).await.failures();
        assert!(failures.contains_key("the response differs from the request"), "{work:?}: {failures:?}");
    }
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let failures = report(&load(nobody, Work::Connections)).await.failures();
    assert!(failures.keys().all(|failure| failure.starts_with("connect: Connection refused")), "{failures:?}");
    assert!(failures.values().sum::<usize>() < 200, "the clients do not pause after a failure");
}
