//! Real servers: their health checks, and a server that speaks first.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;

use ringway::backend::State;
use ringway::proxy::stats::HelloResult;

use crate::harness::backends::{certificate, free_ports};
use crate::harness::program::{Killed, file};
use crate::harness::{Ringway, eventually, in_namespace, require_tool, soon, static_config};

/// The address of the server with a limit for errors. MariaDB counts no aborted connects from loopback.
const ADDRESS: &str = "10.77.0.1:3306";

/// A MariaDB server, with the data in a folder of its own. It ends when this is dropped.
struct MariaDb {
    _server: Killed,
    socket: String,
}

impl MariaDb {
    async fn start(folder: &Path, address: SocketAddr) -> Self {
        let data = folder.join("data").display().to_string();
        let socket = folder.join("socket").display().to_string();
        let user = "--user=root";
        let install = Command::new("mariadb-install-db")
            .args(["--no-defaults", "--skip-test-db", "--auth-root-authentication-method=normal", user])
            .arg(format!("--datadir={data}"))
            .output();
        let install = install.unwrap();
        assert!(install.status.success(), "{}", String::from_utf8_lossy(&install.stderr));
        let server = Command::new("mariadbd")
            .args(["--no-defaults", user, "--max-connect-errors=20"])
            .args([format!("--bind-address={}", address.ip()), format!("--port={}", address.port())])
            .args([format!("--datadir={data}"), format!("--socket={socket}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let server = Self { _server: Killed(server.unwrap()), socket };
        eventually("MariaDB answers", || server.sql("SELECT 1").is_ok()).await;
        server.sql("CREATE USER app@'%'").unwrap();
        server
    }

    /// Runs a statement as the administrator. The error is what the server said.
    fn sql(&self, statement: &str) -> Result<String, String> {
        client(&[&format!("--socket={}", self.socket), "--user=root", "--execute", statement])
    }

    /// The number of connections that ended before a login.
    fn aborted(&self) -> u64 {
        let answer = self.sql("SHOW GLOBAL STATUS LIKE 'Aborted_connects'").unwrap();
        answer.split_whitespace().last().unwrap().parse().unwrap()
    }
}

/// Logs in over the network.
fn login(address: SocketAddr) -> Result<String, String> {
    let (host, port) = (format!("--host={}", address.ip()), format!("--port={}", address.port()));
    client(&[&host, &port, "--user=app", "--execute", "SELECT 1"])
}

fn client(arguments: &[&str]) -> Result<String, String> {
    let output =
        Command::new("mariadb").args(["--no-defaults", "--skip-column-names"]).args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// The test runs itself again in namespaces of its own: with an address that is not loopback, and a name for it.
#[tokio::test]
#[ignore = "needs root and MariaDB"]
async fn tcp_checks_do_not_lock_ringway_out_of_mariadb() {
    const NAME: &str = "real_servers::tcp_checks_do_not_lock_ringway_out_of_mariadb";
    if !require_tool("mariadbd") {
        return;
    }
    // MariaDB counts errors only of hosts whose name it knows.
    let hosts = file("127.0.0.1 localhost\n10.77.0.1 balancer.test\n");
    let mount = format!("ip address add 10.77.0.1/24 dev lo; mount --bind {} /etc/hosts", hosts.path().display());
    if !in_namespace(NAME, &mount).await {
        return;
    }
    let (folder, address) = (tempfile::tempdir().unwrap(), ADDRESS.parse().unwrap());
    let server = MariaDb::start(folder.path(), address).await;
    login(address).unwrap();
    // Plain connects, as simple checks make them, block the host.
    for _ in 0..25 {
        drop(std::net::TcpStream::connect(ADDRESS).unwrap());
    }
    eventually("the host is blocked", || login(address).is_err_and(|error| error.contains("is blocked"))).await;
    server.sql("FLUSH HOSTS").unwrap();
    login(address).unwrap();
    let before = server.aborted();
    assert!(before >= 20, "{before}");

    let yaml = static_config(&[ADDRESS.parse().unwrap()], "health_check: { kind: tcp, interval: 10ms }");
    let ringway = Ringway::start(&yaml).await;
    let live = ringway.backend(0).live;
    eventually("300 checks", || live.counters.checks_passed.load(Ordering::Relaxed) >= 300).await;
    // A check whose thread loses the processor between two calls is accepted, and then counts as a plain connect.
    let aborted = server.aborted() - before;
    println!("{aborted} aborted connects in 300 checks");
    assert!(aborted <= 3, "{aborted} aborted connects in 300 checks");
    assert_eq!(ringway.states(), [State::Healthy]);
    login(address).unwrap();
}

/// A client of MariaDB waits for the server. Behind a listener with TLS routes, it is served after a delay.
#[tokio::test]
#[ignore = "needs root and MariaDB"]
async fn mariadb_works_beside_tls_routes() {
    if !require_tool("mariadbd") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let [port] = free_ports();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let _server = MariaDb::start(folder.path(), address).await;
    let yaml = static_config(&[address], "health_check: { kind: none }").replace(
        "    pool: echo",
        "    routes: [{ sni: [a.example], pool: reset }, { tls: false, pool: echo }]\n    pool: reset\n    hello: { timeout: 1s }",
    );
    let ringway = Ringway::start(&yaml).await;
    let web = ringway.web();
    let answer = tokio::task::spawn_blocking(move || login(web));
    assert_eq!(soon("a login", answer).await.unwrap().unwrap(), "1\n");
    assert_eq!(ringway.state().listeners[0].stats.hellos(HelloResult::Silent), 1);
}

/// OpenSSL's server with these options, and a certificate. It ends when it is dropped.
async fn openssl(folder: &Path, options: &[&str]) -> (Killed, SocketAddr) {
    let [port] = free_ports();
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let server = Command::new("openssl")
        .args(["s_server", "-quiet", "-key", "key.pem", "-cert", "cert.pem", "-accept", &address.to_string()])
        .args(options)
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let server = Killed(server.unwrap());
    eventually("openssl listens", || std::net::TcpStream::connect(address).is_ok()).await;
    (server, address)
}

#[tokio::test]
async fn a_tls_check_passes_where_a_tls_server_would_go_on() {
    if !require_tool("openssl") {
        return;
    }
    let folder = certificate();
    for (options, check, result) in [
        (&["-tls1_3"][..], "", "ok"),
        (&["-tls1_2"], "", "ok"),
        // The server asks for another key: a HelloRetryRequest.
        (&["-tls1_3", "-groups", "P-521"], "", "ok"),
        (
            &["-servername", "a.example", "-servername_fatal", "-cert2", "cert.pem", "-key2", "key.pem"],
            ", sni: a.example",
            "ok",
        ),
        (
            &["-servername", "a.example", "-servername_fatal", "-cert2", "cert.pem", "-key2", "key.pem"],
            ", sni: b.example",
            "TLS alert unrecognized_name",
        ),
        (&["-alpn", "h2"], ", alpn: [http/1.1, h2]", "ok"),
        (&["-alpn", "h2"], ", alpn: [http/1.1]", "TLS alert no_application_protocol"),
        (&["-tls1_3", "-groups", "X448"], "", "TLS alert handshake_failure"),
    ] {
        let (_server, address) = openssl(folder.path(), options).await;
        let check = format!("health_check: {{ kind: tls{check}, interval: 50ms, timeout: 1s, fall: 1 }}");
        let ringway = Ringway::start(&static_config(&[address], &check)).await;
        let wanted = format!("{options:?}: {result}");
        let last = || ringway.backend(0).health.last.as_deref().map(str::to_owned);
        eventually(&wanted, || last().as_deref() == Some(result)).await;
        let state = if result == "ok" { State::Healthy } else { State::Unhealthy };
        eventually(&wanted, || ringway.states() == [state]).await;
    }
}
