//! Handshakes of real TLS clients: recorded ones, and clients that connect to real servers through Ringway.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use ringway::client_hello::{Parsed, parse};
use tempfile::TempDir;

use super::*;
use crate::harness::backends::{certificate, free_ports};
use crate::harness::program::{Killed, file};
use crate::harness::{has_tool, require_tool};

/// `tests/hellos/capture.py` has recorded these.
#[test]
fn the_first_messages_of_real_clients_are_understood() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hellos");
    let mut count = 0;
    for (name, server_name, protocols, has_ech) in [
        ("chromium-156", true, &["h2", "http/1.1"][..], true),
        ("curl-7.88", true, &["h2", "http/1.1"], false),
        ("gnutls-3.7", true, &["h2"], false),
        ("go-1.19", true, &["h2", "http/1.1"], false),
        ("libpq-18", false, &["postgresql"], false),
        ("openssl-3.0", true, &["h2", "http/1.1"], false),
        ("openssl-3.0-no-name", false, &[], false),
        ("openssl-3.0-tls1.2", true, &[], false),
        ("openssl-3.0-fragments", true, &["p000"], false),
        ("python-3.11", true, &["http/1.1"], false),
        ("rustls-0.23", true, &["h2"], false),
    ] {
        let bytes = std::fs::read(folder.join(name).with_added_extension("bin")).unwrap();
        let Parsed::Hello(hello) = parse(&bytes, 1 << 16) else { panic!("{name}: {:?}", parse(&bytes, 1 << 16)) };
        assert_eq!(hello.server_name.as_deref(), server_name.then_some("www.example.com"), "{name}");
        let found: Vec<_> = hello.protocols().take(protocols.len().max(1)).collect();
        assert_eq!(found, protocols.iter().map(|name| name.as_bytes()).collect::<Vec<_>>(), "{name}");
        assert_eq!((hello.has_ech, hello.length), (has_ech, bytes.len()), "{name}");
        for end in 0..bytes.len() {
            assert_eq!(parse(&bytes[..end], 1 << 16), Parsed::Incomplete, "{name} cut at {end}");
        }
        count += 1;
    }
    let recorded = std::fs::read_dir(folder)
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|extension| extension == "bin"));
    assert_eq!(recorded.count(), count, "a recorded message is not tested");
}

/// nginx with one HTTPS site on each port. A site answers with its letter.
async fn nginx(folder: &TempDir, sites: &[(char, u16)]) -> Killed {
    let server = |&(letter, port): &(char, u16)| {
        format!(
            "server {{ listen 127.0.0.1:{port} ssl http2; ssl_certificate cert.pem; ssl_certificate_key key.pem;\n\
             location / {{ default_type text/html; return 200 'site-{letter}'; }} }}\n"
        )
    };
    let servers = sites.iter().map(server).collect::<Vec<_>>().concat();
    let config = format!(
        "daemon off; master_process off; pid nginx.pid; error_log error.log;\nevents {{}}\nhttp {{ access_log off;\n\
         client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4; scgi_temp_path t5;\n{servers}}}"
    );
    std::fs::write(folder.path().join("nginx.conf"), config).unwrap();
    let nginx = Command::new("nginx")
        .arg("-p")
        .arg(folder.path())
        .args(["-c", "nginx.conf", "-e", "error.log"])
        .stderr(Stdio::null())
        .spawn();
    let nginx = Killed(nginx.unwrap());
    for &(_, port) in sites {
        eventually_async("nginx listens", async || TcpStream::connect(("127.0.0.1", port)).await.is_ok()).await;
    }
    nginx
}

/// A Ringway that leads `a.example` and `b.example` to these ports by name, and nothing else.
async fn by_name(ports: [u16; 2]) -> Ringway {
    let yaml = format!(
        "api: {{ listen: \"127.0.0.1:0\" }}\nlisteners:\n  - name: web\n    listen: 127.0.0.1:0\n\
         \x20   routes: [{{ sni: [a.example], pool: a }}, {{ sni: [b.example], pool: b }}]\n    pool: reset\npools:\n\
         \x20 - {{ name: a, provider: {{ static: [{{ address: \"127.0.0.1:{}\" }}] }}, {PLAIN_POOL} }}\n\
         \x20 - {{ name: b, provider: {{ static: [{{ address: \"127.0.0.1:{}\" }}] }}, {PLAIN_POOL} }}\n",
        ports[0], ports[1]
    );
    Ringway::start(&yaml).await
}

async fn output(program: &str, arguments: &[&str]) -> Output {
    let output = tokio::process::Command::new(program).args(arguments).stdin(Stdio::null()).kill_on_drop(true).output();
    soon(program, output).await.unwrap()
}

#[tokio::test]
async fn curl_and_openssl_reach_two_https_sites_behind_one_port() {
    if !["nginx", "curl", "openssl"].into_iter().all(require_tool) {
        return;
    }
    let folder = certificate();
    let ports = free_ports::<2>();
    let _nginx = nginx(&folder, &[('a', ports[0]), ('b', ports[1])]).await;
    let ringway = by_name(ports).await;
    let port = ringway.web().port();
    for site in ['a', 'b'] {
        for version in ["--http1.1", "--http2", "--tls-max"] {
            let url = format!("https://{site}.example:{port}/");
            let resolve = format!("{site}.example:{port}:127.0.0.1");
            let mut arguments = vec!["--silent", "--show-error", "--insecure", "--resolve", &resolve, &url, version];
            arguments.extend((version == "--tls-max").then_some("1.2"));
            let page = output("curl", &arguments).await;
            let said = String::from_utf8_lossy(&page.stderr);
            assert_eq!(String::from_utf8_lossy(&page.stdout), format!("site-{site}"), "{version}: {said}");
        }
        // A hello over three records.
        let many: Vec<String> = (0..200).map(|n| format!("p{n:03}")).chain(["http/1.1".to_owned()]).collect();
        let (many, connect, name) = (many.join(","), format!("127.0.0.1:{port}"), format!("{site}.example"));
        let session = output(
            "openssl",
            &["s_client", "-connect", &connect, "-servername", &name, "-max_send_frag", "512", "-alpn", &many],
        )
        .await;
        let said = String::from_utf8_lossy(&session.stdout);
        assert!(said.contains("ALPN protocol: http/1.1"), "{said}");
    }
    // A name without a route.
    let url = format!("https://c.example:{port}/");
    let resolve = format!("c.example:{port}:127.0.0.1");
    let page = output("curl", &["--silent", "--insecure", "--resolve", &resolve, &url]).await;
    assert!(!page.status.success());
    eventually("counted", || stats(&ringway).refused(RefusalReason::NoRoute) == 1).await;
}

/// The browser sends a post-quantum key share, and the extension for an encrypted ClientHello.
#[tokio::test]
#[ignore = "needs Chromium"]
async fn chromium_reaches_two_https_sites_behind_one_port() {
    // In CI too: the package is large, and a browser on a busy machine needs many minutes.
    if !["nginx", "chromium", "openssl"].into_iter().all(has_tool) {
        println!("skipped: nginx, chromium or openssl is not installed");
        return;
    }
    let folder = certificate();
    let ports = free_ports::<2>();
    let _nginx = nginx(&folder, &[('a', ports[0]), ('b', ports[1])]).await;
    let ringway = by_name(ports).await;
    let port = ringway.web().port();
    let profile = format!("--user-data-dir={}", folder.path().join("profile").display());
    for site in ['a', 'b'] {
        let url = format!("https://{site}.example:{port}/");
        let arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--ignore-certificate-errors",
            "--host-resolver-rules=MAP *.example 127.0.0.1",
            &profile,
            "--dump-dom",
            &url,
        ];
        // A browser gives a page up when a network interface comes or goes, as other tests make them.
        eventually_async("the page", async || {
            let page = output("chromium", &arguments).await;
            String::from_utf8_lossy(&page.stdout).contains(&format!("site-{site}"))
        })
        .await;
    }
    assert!(stats(&ringway).hellos_with_ech() >= 2);
}

/// One port for both kinds of clients of one server.
#[tokio::test]
async fn redis_has_one_port_with_and_without_tls() {
    if !["redis-server", "redis-cli", "openssl"].into_iter().all(require_tool) {
        return;
    }
    let folder = certificate();
    let ports = free_ports::<2>();
    let server = Command::new("redis-server")
        .args(["--port", &ports[0].to_string(), "--tls-port", &ports[1].to_string(), "--save", ""])
        .args(["--tls-cert-file", "cert.pem", "--tls-key-file", "key.pem", "--tls-ca-cert-file", "cert.pem"])
        .args(["--tls-auth-clients", "no", "--bind", "127.0.0.1"])
        .current_dir(folder.path())
        .stdout(Stdio::null())
        .spawn();
    let _server = Killed(server.unwrap());
    for port in ports {
        eventually_async("redis listens", async || TcpStream::connect(("127.0.0.1", port)).await.is_ok()).await;
    }
    let yaml = by_kind(ports);
    let ringway = Ringway::start(&yaml).await;
    let port = ringway.web().port().to_string();
    let plain = output("redis-cli", &["-p", &port, "SET", "key", "value"]).await;
    assert_eq!(String::from_utf8_lossy(&plain.stdout), "OK\n", "{}", String::from_utf8_lossy(&plain.stderr));
    let tls = output("redis-cli", &["-p", &port, "--tls", "--insecure", "GET", "key"]).await;
    assert_eq!(String::from_utf8_lossy(&tls.stdout), "value\n", "{}", String::from_utf8_lossy(&tls.stderr));
    eventually("counted", || {
        stats(&ringway).hellos(HelloResult::Plain) == 1 && stats(&ringway).hellos(HelloResult::NoSni) == 1
    })
    .await;
}

/// Clients without TLS go to the first port, and clients with it to the second one.
fn by_kind(ports: [u16; 2]) -> String {
    format!(
        "api: {{ listen: \"127.0.0.1:0\" }}\nlisteners:\n  - name: web\n    listen: 127.0.0.1:0\n\
         \x20   routes: [{{ tls: false, pool: plain }}]\n    pool: tls\npools:\n\
         \x20 - {{ name: plain, provider: {{ static: [{{ address: \"127.0.0.1:{}\" }}] }}, {PLAIN_POOL} }}\n\
         \x20 - {{ name: tls, provider: {{ static: [{{ address: \"127.0.0.1:{}\" }}] }}, {PLAIN_POOL} }}\n",
        ports[0], ports[1]
    )
}

/// This SSH client waits for the server.
#[tokio::test]
async fn ssh_works_beside_https() {
    if !["nginx", "curl", "openssl", "ssh-keygen", "ssh-keyscan"].into_iter().all(require_tool) {
        return;
    }
    let folder = certificate();
    let ports = free_ports::<2>();
    let _nginx = nginx(&folder, &[('a', ports[1])]).await;
    let key = folder.path().join("host_key");
    let made = output("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-f", key.to_str().unwrap()]).await;
    assert!(made.status.success());
    let public = std::fs::read_to_string(key.with_extension("pub")).unwrap();
    let config =
        file(&format!("Port {}\nListenAddress 127.0.0.1\nHostKey {}\nPidFile none\n", ports[0], key.display()));
    // The server insists on its full path, and on this folder if it runs as root.
    let _ = std::fs::create_dir_all("/run/sshd");
    let server = Command::new("/usr/sbin/sshd").arg("-D").arg("-f").arg(config.path()).stderr(Stdio::null()).spawn();
    let Ok(server) = server else { return crate::harness::skip("sshd is not installed") };
    let _server = Killed(server);
    eventually_async("sshd listens", async || TcpStream::connect(("127.0.0.1", ports[0])).await.is_ok()).await;
    let yaml = by_kind(ports).replace("    pool: tls\n", "    pool: tls\n    hello: { timeout: 3s }\n");
    let ringway = Ringway::start(&yaml).await;
    let port = ringway.web().port();
    let keys = output("ssh-keyscan", &["-T", "50", "-t", "ed25519", "-p", &port.to_string(), "127.0.0.1"]).await;
    let seen = String::from_utf8_lossy(&keys.stdout).into_owned();
    let wanted = public.split_whitespace().nth(1).unwrap();
    assert!(seen.contains(wanted), "{seen}\n{}", String::from_utf8_lossy(&keys.stderr));
    let page = output("curl", &["--silent", "--insecure", &format!("https://127.0.0.1:{port}/")]).await;
    assert_eq!(String::from_utf8_lossy(&page.stdout), "site-a");
}
