//! The page of the side port, in a real browser.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::backends::{Refusing, Server};
use crate::harness::browser::Browser;
use crate::harness::program::Program;
use crate::harness::{THREE_REPLICAS, config, eventually_async, get, http, http_with, soon, static_config};

/// The rows of all tables of backends.
const ROWS: &str = "return document.querySelectorAll('table.backends tbody tr').length";

/// The state that the page shows for a backend.
fn state(id: &str) -> String {
    format!(
        "return [...document.querySelectorAll('table.backends tbody tr')].find((row) => row.dataset.id === {id:?})?.cells[1].textContent"
    )
}

async fn opened(program: &Program, width: u32, height: u32) -> Option<Browser> {
    let browser = Browser::start(width, height).await?;
    browser.open(&format!("http://{}/", program.api())).await;
    Some(browser)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_click_drains_a_backend_after_showing_what_moves() {
    let program = Program::start(&config(THREE_REPLICAS, "", "drain: 1m")).await.ready().await;
    let Some(browser) = opened(&program, 1300, 1000).await else { return };
    browser.until("three backends", &format!("{ROWS} === 3")).await;
    let shares = browser.script("return [...document.querySelectorAll('table.backends tbody tr')].map((row) => parseFloat(row.cells[3].textContent)).reduce((a, b) => a + b).toFixed(1)").await;
    assert_eq!(shares, "100.0");
    let chart = "return document.querySelector('.charts .spark').getAttribute('aria-label')";
    browser.until("the last minutes", &format!("{chart}.includes('in the last 5 minutes')")).await;
    let choose = |value: &str| {
        format!(
            "const list = document.getElementById('period'); list.value = '{value}'; list.dispatchEvent(new Event('change'))"
        )
    };
    browser.script(&choose("300")).await;
    browser.until("the last day", &format!("{chart}.includes('No averages yet')")).await;
    browser.script(&choose("1")).await;
    browser
        .until("the history", "return document.querySelector('.charts .spark path').getAttribute('d').includes('L')")
        .await;
    browser.until("the last minutes", &format!("{chart}.includes('in the last 5 minutes')")).await;
    browser.click("button[aria-label='Drain echo-2']").await;
    browser.until("the forecast", "return /keys move/.test(document.getElementById('preview').textContent)").await;
    let forecast = browser.script("return document.getElementById('preview').textContent").await;
    assert!(forecast.as_str().unwrap().contains("Pool echo: 3"), "{forecast}");
    assert_eq!(program.status().await["pools"][0]["backends"][1]["drain"], Value::Null, "a forecast changes nothing");
    browser.click("#confirm").await;
    browser.until("the drained backend", &format!("{} .includes('draining')", state("echo-2"))).await;
    assert_ne!(program.status().await["pools"][0]["backends"][1]["drain"], Value::Null);
    browser
        .until("the banner", "return /echo-2 is drained/.test(document.getElementById('banners').textContent)")
        .await;
    browser.until("an event", "return /command done: drain/.test(document.getElementById('events').textContent)").await;
    browser.click("button[aria-label='Undrain echo-2']").await;
    browser
        .until("the forecast", "return document.getElementById('confirm').getAttribute('aria-disabled') === 'false'")
        .await;
    browser.click("#confirm").await;
    browser.until("the healthy backend", &format!("{} .includes('healthy')", state("echo-2"))).await;
    assert_eq!(browser.complaints().await, [] as [&str; 0]);
    if let Some(folder) = std::env::var_os("RINGWAY_PICTURES") {
        browser.picture(&Path::new(&folder).join("page.png")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_keyboard_alone_drains_a_backend_and_explains_a_choice() {
    let server = Server::echo("a").await;
    let program = Program::start(&static_config(&[server.address], "health_check: { kind: none }")).await.ready().await;
    let Some(browser) = opened(&program, 1000, 800).await else { return };
    browser.until("a backend", &format!("{ROWS} === 1")).await;
    let focused = async || {
        let script = "const e = document.activeElement; return e.getAttribute('aria-label') || e.id || e.className";
        browser.script(script).await.as_str().unwrap_or_default().to_owned()
    };
    let tab_to = async |wanted: &str| {
        let mut seen = Vec::new();
        while seen.len() < 30 {
            browser.keys("\u{e004}").await;
            seen.push(focused().await);
            if seen.last().is_some_and(|last| last == wanted) {
                return;
            }
        }
        panic!("{wanted} is not among {seen:?}");
    };
    browser.keys("\u{e004}").await;
    assert_eq!(focused().await, "skip", "the first stop skips to the pools");
    tab_to("Drain b0").await;
    browser.keys("\u{e007}").await;
    browser.until("the dialog", "return document.getElementById('dialog').open").await;
    browser.keys("\u{e00c}").await;
    browser.until("a closed dialog", "return !document.getElementById('dialog').open").await;
    assert_eq!(focused().await, "Drain b0", "the dialog gives the focus back");
    browser.keys("\u{e007}").await;
    browser
        .until("the forecast", "return document.getElementById('confirm').getAttribute('aria-disabled') === 'false'")
        .await;
    tab_to("confirm").await;
    browser.keys("\u{e007}").await;
    browser.until("the drained backend", &format!("{} .includes('draining')", state("b0"))).await;
    tab_to("client").await;
    browser.keys("10.0.0.9:5000\u{e007}").await;
    browser
        .until("an explanation", "return /Key source/.test(document.getElementById('explanation').textContent)")
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn banners_tell_of_empty_pools_and_of_tiers_that_have_spilled() {
    let (dead, spare) = (Refusing::new(), Server::echo("spare").await);
    let list = format!(
        "static: [{{ address: \"{}\", id: dead }}, {{ address: \"{}\", id: spare, tier: 1 }}]",
        dead.address, spare.address
    );
    let yaml = config(&list, "", "health_check: { kind: tcp, interval: 50ms, fall: 1 }");
    let asleep = "process: { replicas: { max: 1 }, command: [ringway, echo-server, --listen, \"127.0.0.1:{port}\"] }";
    let pools = format!(
        "{yaml}\n  - {{ name: none, provider: {{ static: [] }} }}\n  - {{ name: tired, provider: {{ {asleep} }} }}"
    );
    let program = Program::start(&pools).await.ready().await;
    let Some(browser) = opened(&program, 1000, 800).await else { return };
    let banner = |text: &str| format!("return document.getElementById('banners').textContent.includes('{text}')");
    browser
        .until(
            "the spilled tier",
            &banner("Pool echo: too few backends of the lowest tier are healthy, so keys go to tier 1."),
        )
        .await;
    browser.until("the empty pool", &banner("Pool none has no backends.")).await;
    browser.until("the sleeping pool", &banner("Pool tired sleeps until a connection comes.")).await;
    assert_eq!(browser.script(&banner("Pool tired has no")).await, false, "it sleeps on purpose");
    browser.until("the failing backend", &banner("1 of 2 backends fail: dead")).await;
    assert_eq!(browser.script(&banner("Pool echo has no")).await, false, "it has a healthy backend");
    assert_eq!(browser.complaints().await, [] as [&str; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_names_and_texts_stay_text() {
    let hostile = "<img/src=x/onerror=document.title='hacked'>";
    // The server's answer appears as the result of the check.
    let server = Server::start(|mut stream| async move {
        let _ = stream.write_all(b"<script>document.title='hacked'</script>").await;
    })
    .await;
    let provider = format!("static: [{{ address: \"{}\", id: \"{hostile}\" }}]", server.address);
    let yaml = config(&provider, "", "health_check: { kind: expect, expect: \"+PONG\", interval: 50ms, fall: 1 }");
    let program = Program::start(&yaml).await;
    let Some(browser) = opened(&program, 1000, 800).await else { return };
    browser.until("the failed check", "return /unexpected/.test(document.querySelector('td.why')?.textContent)").await;
    let name = browser.script("return document.querySelector('table.backends tbody th').firstChild.textContent").await;
    assert_eq!(name, hostile);
    let why = browser.script("return document.querySelector('td.why').textContent").await;
    assert!(why.as_str().unwrap().contains("<script>"), "{why}");
    let injected =
        "return document.querySelectorAll('main img, main script').length + (document.title === 'hacked' ? 1 : 0)";
    assert_eq!(browser.script(injected).await, 0);
    assert_eq!(browser.complaints().await, [] as [&str; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_backends_are_shown_and_stay_current() {
    let addresses: Vec<SocketAddr> = (0..1000).map(|n| SocketAddr::from(([127, 1, 0, 1], 10_000 + n))).collect();
    let yaml = static_config(&addresses, "health_check: { kind: none }");
    let program = Program::start(&yaml).await.ready().await;
    let Some(browser) = opened(&program, 1300, 1000).await else { return };
    browser.until("all backends", &format!("{ROWS} === 1000")).await;
    println!("first row after {} ms", browser.script("return Math.round(performance.now())").await);
    let answer = http(program.api(), "POST", "/api/pools/echo/backends/b777/drain", b"").await;
    assert_eq!(answer.status(), 200);
    browser.until("the drained backend", &format!("{} .includes('draining')", state("b777"))).await;
    let answer = http(program.api(), "DELETE", "/api/pools/echo/backends/b778", b"").await;
    assert_eq!(answer.status(), 200);
    browser.until("one backend less", &format!("{ROWS} === 999")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_token_the_page_asks_for_it_and_keeps_it_in_memory() {
    let server = Server::echo("a").await;
    let yaml = static_config(&[server.address], "health_check: { kind: none }");
    let program = Program::start_with(&yaml, &[("RINGWAY_TOKEN", "open-sesame")]).await.ready().await;
    assert_eq!(get(program.api(), "/api/stream").await.0, 401);
    let Some(browser) = opened(&program, 1000, 800).await else { return };
    browser.until("the question", "return !document.getElementById('access').hidden").await;
    browser.click("#token").await;
    browser.keys("wrong\u{e007}").await;
    browser.until("the refusal", "return /wrong token/.test(document.getElementById('refused').textContent)").await;
    browser.click("#token").await;
    browser.keys("open-sesame\u{e007}").await;
    browser.until("a backend", &format!("{ROWS} === 1")).await;
    assert_eq!(browser.script("return sessionStorage.length + document.cookie.length").await, 0);
}

/// Rules that every page must meet, checked by axe-core if `RINGWAY_AXE` names its script.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_has_no_accessibility_fault() {
    let Some(axe) = std::env::var_os("RINGWAY_AXE") else {
        crate::harness::skip("RINGWAY_AXE does not name axe.min.js");
        return;
    };
    let axe = std::fs::read_to_string(axe).unwrap();
    let no_program = "process: { replicas: 1, command: [sh, -c, \"echo last words {port}; exit 3\"] }";
    let yaml = config(THREE_REPLICAS, "", "drain: 1m")
        + &format!("\n  - {{ name: dead, provider: {{ {no_program} }}, health_check: {{ kind: none }} }}\n");
    let program = Program::start(&yaml).await;
    for (width, height) in [(1300, 1000), (400, 800)] {
        let Some(browser) = opened(&program, width, height).await else { return };
        browser.until("four backends", &format!("{ROWS} === 4")).await;
        browser.until("last words", "return document.querySelector('details') !== null").await;
        browser.script(&axe).await;
        for scheme in ["light", "dark"] {
            browser.emulate(scheme).await;
            let found = browser.script_async("const done = arguments[arguments.length - 1]; axe.run().then((result) => done(result.violations.map((one) => `${one.id}: ${one.help}: ${one.nodes.map((node) => node.html).join(' | ')}`)), (error) => done([String(error)]))").await;
            assert_eq!(found, serde_json::json!([]), "{width} {scheme}: {found:#}");
            if let Some(folder) = std::env::var_os("RINGWAY_PICTURES") {
                browser.picture(&Path::new(&folder).join(format!("page-{width}-{scheme}.png"))).await;
            }
        }
        let wide =
            browser.script("return document.documentElement.scrollWidth > document.documentElement.clientWidth").await;
        assert_eq!(wide, false, "the page is wider than a window of {width} pixels");
    }
}

#[tokio::test]
async fn the_page_is_served_with_a_strict_policy_and_only_to_those_who_may_see_it() {
    let server = Server::echo("a").await;
    let yaml = static_config(&[server.address], "");
    let program = Program::start(&yaml).await;
    let own = program.api().to_string();
    for path in ["/", "/page/app.js", "/page/style.css", "/page/icon.svg"] {
        let answer = http(program.api(), "GET", path, b"").await;
        assert_eq!(answer.status(), 200, "{path}");
        let header = |name: &str| answer.headers()[name].to_str().unwrap().to_owned();
        let policy = header("content-security-policy");
        assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
        assert_eq!((header("x-content-type-options"), header("cache-control")), ("nosniff".into(), "no-store".into()));
        let rebound = http_with(program.api(), "GET", path, &[("host", "evil.example")], b"").await;
        assert_eq!(rebound.status(), 421, "{path}");
    }
    for path in ["/api/stream", "/api/events", "/api/history?pool=echo"] {
        let foreign = [("host", own.as_str()), ("origin", "http://evil.example")];
        assert_eq!(http_with(program.api(), "GET", path, &foreign, b"").await.status(), 403, "{path}");
    }
    // Off loopback without a token there is no page, and with `page: false` nowhere.
    let public = Program::start(&yaml.replacen("\"127.0.0.1:0\"", "\"0.0.0.0:0\"", 1)).await;
    let (status, body) = get(loopback(&public), "/").await;
    assert!(status == 403 && body.contains("read-only"), "{status} {body}");
    let without = Program::start(&yaml.replace("api: {", "api: { page: false, history: false,")).await;
    assert_eq!(get(without.api(), "/").await.0, 404);
    assert_eq!(get(without.api(), "/api/history?pool=echo").await.0, 404);
}

fn loopback(program: &Program) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], program.api().port()))
}

/// Reads events of the stream until one of them is good.
async fn event(stream: &mut TcpStream, buffer: &mut String, is_it: impl Fn(&Value) -> bool) -> Value {
    soon("an event of the stream", async {
        loop {
            while let Some(end) = buffer.find("\n\n") {
                let message: String = buffer.drain(..end + 2).collect();
                let data = message.lines().find_map(|line| line.strip_prefix("data: "));
                if let Some(value) = data.and_then(|data| serde_json::from_str(data).ok()).filter(&is_it) {
                    return value;
                }
            }
            let mut bytes = vec![0; 65_536];
            let read = stream.read(&mut bytes).await.unwrap();
            assert!(read > 0, "the stream ended");
            buffer.push_str(&String::from_utf8_lossy(&bytes[..read]));
        }
    })
    .await
}

async fn streaming(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET /api/stream HTTP/1.1\r\nhost: {address}\r\n\r\n").as_bytes()).await.unwrap();
    stream
}

#[tokio::test]
async fn the_stream_begins_with_everything_and_goes_on_with_what_changes() {
    let servers = [Server::echo("a").await, Server::echo("b").await];
    let yaml = static_config(&servers.each_ref().map(|server| server.address), "health_check: { kind: none }");
    let program = Program::start(&yaml).await.ready().await;
    let (mut stream, mut buffer) = (streaming(program.api()).await, String::new());
    let first = event(&mut stream, &mut buffer, |_| true).await;
    let ids = |value: &Value| {
        let backends = value["changed"]["echo"].as_array().unwrap();
        backends.iter().map(|backend| backend["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ids(&first), ["b0", "b1"]);
    assert!(first["events"].as_array().is_some_and(|events| !events.is_empty()), "{first}");
    let second = event(&mut stream, &mut buffer, |_| true).await;
    assert_eq!((ids(&second), second["members"].clone()), (Vec::new(), serde_json::json!({})), "nothing has changed");
    assert_eq!(http(program.api(), "POST", "/api/pools/echo/backends/b1/drain", b"").await.status(), 200);
    let change = event(&mut stream, &mut buffer, |value| !ids(value).is_empty()).await;
    assert_eq!(ids(&change)[0], if ids(&change).len() == 2 { "b0" } else { "b1" });
    let of_b1 = change["changed"]["echo"].as_array().unwrap().iter().find(|one| one["id"] == "b1").unwrap();
    assert_eq!(of_b1["state"], "draining");
    let (_, events) = get(program.api(), "/api/events").await;
    assert!(events.contains("command done: drain echo/b1"), "{events}");
    eventually_async("a history", async || {
        let (status, body) = get(program.api(), "/api/history?pool=echo&backend=b0").await;
        let samples: Value = serde_json::from_str(&body).unwrap();
        status == 200 && samples["connections"].as_array().is_some_and(|samples| samples.len() > 1)
    })
    .await;
    for (path, status) in
        [("pool=no", 404), ("pool=echo&step=7", 400), ("backend=b0", 400), ("pool=echo&backend=no", 404)]
    {
        assert_eq!(get(program.api(), &format!("/api/history?{path}")).await.0, status, "{path}");
    }
}

#[tokio::test]
async fn the_stream_shows_a_stop_until_the_connections_have_drained() {
    let server = Server::echo("a").await;
    let yaml = static_config(&[server.address], "health_check: { kind: none }\ndrain: 1m");
    let mut program = Program::start(&yaml).await.ready().await;
    let mut open = TcpStream::connect(program.web()).await.unwrap();
    assert!(crate::harness::echoes(&mut open).await);
    let (mut stream, mut buffer) = (streaming(program.api()).await, String::new());
    event(&mut stream, &mut buffer, |value| value["status"]["ready"] == true).await;
    program.signal(rustix::process::Signal::TERM);
    let stopping = |value: &Value| value["status"]["ready"] == false;
    for _ in 0..2 {
        event(&mut stream, &mut buffer, stopping).await;
    }
    // A stream that begins now shows the drain too.
    let (mut late, mut other) = (streaming(program.api()).await, String::new());
    let change = event(&mut late, &mut other, stopping).await;
    assert_eq!(change["changed"]["echo"][0]["connections"]["active"], 1);
    drop(open);
    assert_eq!(program.ended().await.code(), Some(0));
}

#[tokio::test]
async fn readers_that_stall_cost_no_memory_and_do_not_hold_up_others_or_a_stop() {
    let addresses: Vec<SocketAddr> = (0..1000).map(|n| SocketAddr::from(([127, 1, 0, 1], 10_000 + n))).collect();
    let mut program = Program::start(&static_config(&addresses, "health_check: { kind: none }")).await.ready().await;
    let mut stalled = Vec::new();
    for _ in 0..8 {
        stalled.push(streaming(program.api()).await);
    }
    eventually_async("all streams taken", async || get(program.api(), "/api/stream").await.0 == 503).await;
    let before = program.memory();
    // Each drain changes a backend for every stream.
    for n in 0..200 {
        let path = format!("/api/pools/echo/backends/b{n}/drain");
        assert_eq!(http(program.api(), "POST", &path, b"").await.status(), 200);
    }
    let after = program.memory();
    assert!(after < before + (32 << 20), "{before} bytes before, {after} after");
    // Those who end make room.
    stalled.truncate(7);
    eventually_async("a free stream", async || {
        let mut stream = streaming(program.api()).await;
        let mut head = [0; 12];
        stream.read_exact(&mut head).await.is_ok() && head.ends_with(b"200")
    })
    .await;
    program.signal(rustix::process::Signal::TERM);
    assert_eq!(tokio::time::timeout(Duration::from_secs(30), program.ended()).await.unwrap().code(), Some(0));
}
