//! The documents say what the code does: the tables of docs/ against the metrics and the config, and every link.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ringway::config::Config;
use ringway::metrics::{self, Kind};
use tokio::io::AsyncWriteExt as _;

const CONFIGURATION: &str = include_str!("../docs/configuration.md");
const METRICS: &str = include_str!("../docs/metrics.md");

/// The cells of the first table below `heading`, without its first two rows.
fn table(document: &str, heading: &str) -> Vec<Vec<String>> {
    let section = document.split(heading).nth(1).unwrap_or_else(|| panic!("no {heading:?}"));
    let rows = section.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
    let cells = |row: &str| -> Vec<String> {
        row.trim_matches('|').split(" | ").map(|cell| cell.trim().trim_matches('`').to_owned()).collect()
    };
    rows.skip(2).map(cells).collect()
}

#[test]
fn the_metrics_table_lists_what_is_registered() {
    let documented: BTreeMap<String, (String, String, String)> = table(METRICS, "\n## Table of metrics\n")
        .into_iter()
        .map(|row| (row[0].clone(), (row[1].clone(), row[2].replace('`', ""), row[3].clone())))
        .collect();
    let registered: BTreeMap<String, (String, String, String)> = metrics::ALL
        .iter()
        .map(|metric| {
            let kind = match metric.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram => "histogram",
            };
            (metric.name.to_owned(), (kind.to_owned(), metric.labels.join(", "), metric.help.to_owned()))
        })
        .collect();
    assert_eq!(documented, registered);
}

#[tokio::test]
async fn every_registered_metric_is_exported_once_there_was_a_connection() {
    let server = crate::harness::backends::Server::echo("a").await;
    // A cause of failed connects appears with the first failure.
    let refusing = crate::harness::backends::Refusing::new();
    let extra = "health_check: { kind: none }\nkey: source\nring: { bound: 125 }\nconnect: { source: 127.0.0.1 }";
    let yaml = crate::harness::static_config(&[server.address, refusing.address], extra)
        .replace("    pool: echo", "    proxy_protocol: { from: [127.0.0.0/8], required: false }\n    pool: echo")
        .replace("    pool: echo", "    routes: [{ tls: true, pool: echo, name: tls }]\n    pool: echo");
    // Whether there is an engine or a name server or not.
    let yaml = format!(
        "{yaml}\n  - {{ name: found, provider: {{ docker: {{ discover: {{ label: no.such.label, port: 1 }} }} }} }}\n  \
         - {{ name: named, provider: {{ dns: {{ name: no.such.invalid., port: 1, servers: [127.0.0.1] }} }} }}\n  \
         - {{ name: listed, provider: {{ file: {{ path: /no/such/list }} }} }}\n  \
         - {{ name: run, provider: {{ process: {{ replicas: {{ max: 1 }}, command: [ringway, echo-server, --listen, \"127.0.0.1:{{port}}\"] }} }} }}"
    );
    let ringway = crate::harness::Ringway::start(&yaml).await.all_healthy().await;
    crate::harness::eventually_async("all metrics", async || {
        crate::harness::http(ringway.web(), "GET", "/heartbeat", b"").await;
        let mut tls = tokio::net::TcpStream::connect(ringway.web()).await.unwrap();
        tls.write_all(&loadtest::client_hello("a.example", &[])).await.unwrap();
        let text = crate::harness::get(ringway.api(), "/metrics").await.1;
        metrics::ALL.iter().all(|metric| text.contains(&format!("# TYPE {} ", metric.name)))
    })
    .await;
}

#[tokio::test]
async fn promtool_is_content_with_the_metrics() {
    let server = crate::harness::backends::Server::echo("a").await;
    let yaml = crate::harness::static_config(&[server.address], "");
    let ringway = crate::harness::Ringway::start(&yaml).await.all_healthy().await;
    crate::harness::http(ringway.web(), "GET", "/heartbeat", b"").await;
    let text = crate::harness::get(ringway.api(), "/metrics").await.1;
    let promtool = std::process::Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn();
    let Ok(mut promtool) = promtool else {
        assert!(std::env::var_os("CI").is_none(), "the gate installs promtool");
        println!("promtool is not installed (Debian: prometheus): nothing checked");
        return;
    };
    std::io::Write::write_all(&mut promtool.stdin.take().unwrap(), text.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && said.is_empty(), "{said}");
}

/// The rules of OpenMetrics that Prometheus checks: each family in one piece under its type, no empty line, an end mark.
#[tokio::test]
async fn open_metrics_are_answered_where_they_are_accepted() {
    let server = crate::harness::backends::Server::echo("a").await;
    let yaml = crate::harness::static_config(&[server.address], "ring: { bound: 125 }");
    let ringway = crate::harness::Ringway::start(&yaml).await.all_healthy().await;
    crate::harness::http(ringway.web(), "GET", "/heartbeat", b"").await;
    let headers = [("host", "localhost"), ("accept", "application/openmetrics-text; version=1.0.0")];
    let answer = crate::harness::http_with(ringway.api(), "GET", "/metrics", &headers, b"").await;
    assert_eq!(answer.headers()["content-type"], "application/openmetrics-text; version=1.0.0; charset=utf-8");
    let text = String::from_utf8(answer.into_body().to_vec()).unwrap();
    let body = text.strip_suffix("# EOF\n").unwrap();
    let (mut families, mut current) = (std::collections::BTreeSet::new(), ("", ""));
    for line in body.lines() {
        if let Some(family) = line.strip_prefix("# TYPE ") {
            current = family.split_once(' ').unwrap();
            assert!(families.insert(current.0), "{} stands in two places", current.0);
        } else if let Some(help) = line.strip_prefix("# HELP ") {
            assert!(!help.contains(['"', '\\']), "{help}");
        } else {
            let end = line.strip_prefix(current.0).unwrap_or_else(|| panic!("{line} is not under its type"));
            let name_end = end.split(['{', ' ']).next().unwrap();
            let wanted: &[&str] = match current.1 {
                "counter" => &["_total"],
                "gauge" => &[""],
                _ => &["_bucket", "_sum", "_count"],
            };
            assert!(wanted.contains(&name_end), "{line} as a {}", current.1);
            assert!(line.rsplit(' ').next().unwrap().parse::<f64>().is_ok(), "{line}");
        }
    }
    let all = ringway::metrics::ALL.iter().map(|metric| metric.name.strip_suffix("_total").unwrap_or(metric.name));
    let missing: Vec<_> = all.filter(|name| !families.contains(name)).collect();
    // Nothing has failed, no pool has a source address, no listener accepts PROXY headers or has routes, and there is no engine, no name server and no replica.
    assert!(
        missing.iter().all(|name| name.contains("_engine_")
            || name.contains("_dns_")
            || name.contains("_provider_")
            || name.contains("_rollout")
            || name.contains("_scaling_")
            || name.ends_with("waiting_connections")
            || name.ends_with("connect_failures")
            || name.ends_with("source_skipped")
            || name.ends_with("proxy_headers")
            || name.ends_with("routes")
            || name.ends_with("hellos")
            || name.ends_with("hello_bytes")),
        "{missing:?}"
    );
}

#[tokio::test]
async fn the_metrics_of_each_backend_can_be_fewer() {
    let server = crate::harness::backends::Server::echo("a").await;
    let yaml = crate::harness::static_config(&[server.address], "");
    let ringway = crate::harness::Ringway::start(&yaml).await.all_healthy().await;
    for (mode, shown, hidden) in [
        ("full", &["ringway_backend_up{", "ringway_health_checks_total{"][..], &["no_such_metric"][..]),
        ("compact", &["ringway_backend_up{", "ringway_bytes_total{"], &["ringway_health_checks_total{"]),
        ("off", &["ringway_pool_backends_healthy{"], &["backend=\""]),
    ] {
        ringway.reload(&format!("metrics: {{ per_backend: {mode} }}\n{yaml}")).await.unwrap();
        // Scrapes share a text for a moment if it took long.
        crate::harness::eventually_async(mode, async || {
            let text = crate::harness::get(ringway.api(), "/metrics").await.1;
            shown.iter().all(|words| text.contains(words)) && !hidden.iter().any(|words| text.contains(words))
        })
        .await;
    }
}

/// Every key of the effective config, flattened: `pools[].connect.timeout`.
fn flatten(prefix: &str, value: &serde_yaml::Value, into: &mut BTreeMap<String, String>) {
    match value {
        serde_yaml::Value::Mapping(map) if !map.is_empty() => {
            for (key, value) in map {
                let key = key.as_str().unwrap();
                flatten(&if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") }, value, into);
            }
        }
        serde_yaml::Value::Sequence(list) if list.first().is_some_and(serde_yaml::Value::is_mapping) => {
            flatten(&format!("{prefix}[]"), &list[0], into);
        }
        other => {
            let text = serde_yaml::to_string(other).unwrap();
            into.insert(prefix.to_owned(), text.trim().trim_matches('\'').to_owned());
        }
    }
}

/// The keys and defaults of all providers and both kinds of check, as the code has them.
fn defaults() -> BTreeMap<String, String> {
    let mut keys = BTreeMap::new();
    let providers = [
        "static: [{ address: \"h:1\" }]",
        "process: { replicas: 1, command: [x, \"{port}\"] }",
        "process: { replicas: { max: 1, scale_on: { connections_per_replica: 1 } }, command: [x, \"{port}\"] }",
        "docker: { replicas: 1, image: i, command: [x], port: 1, resources: { memory: 64MiB, cpus: 1 } }",
        "docker: { replicas: { max: 1, scale_on: { connections_per_replica: 1 } }, image: i, command: [x], port: 1, resources: { memory: 64MiB, cpus: 1 } }",
        "docker: { discover: { label: l, port: 1 } }",
        "dns: { name: n, port: 1 }",
        "dns: { srv: n }",
        "file: { path: f }",
    ];
    for provider in providers {
        let checks = [
            ("{ kind: tcp, port: 1 }", "0.0.0.0:1"),
            ("{ kind: http, host: h, body: b }", "0.0.0.0:1"),
            ("{ kind: tls, sni: a.example, alpn: [h2] }", "0.0.0.0:1"),
            ("{ kind: expect, expect: x }", "unix:/s"),
            ("{ kind: expect, steps: [{ expect: x }, { expect: y }] }", "0.0.0.0:1"),
            ("{ kind: grpc }", "0.0.0.0:1"),
            ("{ kind: exec, command: [x] }", "0.0.0.0:1"),
        ];
        for (check, listen) in checks {
            let agent = if listen == "unix:/s" { "off" } else { "{ port: 1 }" };
            let is_last = check.contains("exec");
            let (key, on_move) = if is_last { ("source", "keep") } else { ("source_ip", "{}") };
            let interface = if listen == "unix:/s" { "" } else { "interface: eth0, " };
            let send = if listen == "unix:/s" { "off" } else { "{ version: v2, tlvs: [alpn], pass: [1] }" };
            let yaml = format!(
                "access_log: {{ path: stdout }}\nconfig_watch: {{}}\ndocker: {{ auth_file: f }}\napi: {{ token_file: t }}\n\
                 listeners: [{{ name: a, listen: \"{listen}\", pool: p, per_source: {{ rate: 1 }}, {interface}proxy_protocol: {{ from: [10.0.0.0/8] }}, \
                 routes: [{{ sni: [a.b], alpn: [h2], from: [10.0.0.0/8], tls: true, pool: p }}] }}]\n\
                 pools: [{{ name: p, provider: {{ {provider} }}, health_check: {check}, send_proxy: {send}, agent: {agent}, key: {key}, on_move: {on_move}, \
                 connect: {{ source: 10.0.0.1, interface: eth0, mark: 1, congestion: bbr }} }}]"
            );
            let config = Config::parse(&yaml, "test").unwrap();
            flatten("", &serde_yaml::from_str(&config.to_yaml()).unwrap(), &mut keys);
        }
    }
    keys
}

#[test]
fn the_config_table_is_what_ringway_schema_prints() {
    let of_the_code = ringway::config::markdown();
    let is_there = CONFIGURATION.contains(&format!("\n\n{of_the_code}\n"));
    assert!(is_there, "put the text of `ringway schema --markdown` under `## Keys` in docs/configuration.md");
}

/// Keys that the effective config of these tests does not have: they lead to others, or stand for a value in another form.
const OTHER_FORMS: [&str; 10] = [
    "include",
    "config_watch",
    "tcp.keepalive",
    "listeners[].allow.file",
    "listeners[].deny.file",
    "listeners[].proxy_protocol",
    "pools[].key.source_net.v4",
    "pools[].key.source_net.v6",
    "pools[].send_proxy",
    "pools[].ejection",
];

#[test]
fn the_config_table_lists_every_key_with_its_default() {
    let defaults = defaults();
    let mut documented: BTreeMap<String, String> =
        table(CONFIGURATION, "\n## Keys\n").into_iter().map(|row| (row[0].clone(), row[1].clone())).collect();
    documented.retain(|key, _| {
        key.rsplit('.').next() != Some("hex") && (defaults.contains_key(key) || !OTHER_FORMS.contains(&key.as_str()))
    });
    assert_eq!(documented.keys().collect::<Vec<_>>(), defaults.keys().collect::<Vec<_>>());
    for (key, default) in defaults {
        // What has no default says so; what depends on the rest says it in words.
        let stated = &documented[&key];
        let has_none = stated.starts_with('(');
        let is_off = key.ends_with("per_source.rate") || key.ends_with("health_check.kind");
        assert!(
            has_none || is_off || *stated == default,
            "{key}: docs/configuration.md says {stated}, the code {default}"
        );
    }
}

/// README.md and every page of docs/.
fn pages() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = std::fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let is_page = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "md");
    std::iter::once(root.join("README.md")).chain(docs.filter(is_page)).collect()
}

/// The lines of a page that are not in a code block.
fn prose(page: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(page).unwrap();
    let mut is_code = false;
    let is_prose = |line: &&str| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        !is_code && !is_fence
    };
    text.lines().filter(is_prose).map(str::to_owned).collect()
}

/// The anchors that the headings of a page have on GitHub.
fn anchors(page: &Path) -> Vec<String> {
    let anchor = |heading: &str| -> String {
        let is_kept = |c: &char| c.is_alphanumeric() || " -_".contains(*c);
        heading.trim().to_lowercase().chars().filter(is_kept).map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    prose(page).iter().filter(|line| line.starts_with('#')).map(|line| anchor(line.trim_start_matches('#'))).collect()
}

#[test]
fn no_page_links_to_a_file_or_a_heading_that_does_not_exist() {
    let mut broken = Vec::new();
    let mut checked = 0;
    for page in pages() {
        let text = prose(&page).join("\n");
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.contains("://")) {
            checked += 1;
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            if !target.exists() || (!anchor.is_empty() && !anchors(&target).iter().any(|heading| heading == anchor)) {
                broken.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
    assert!(checked > 30, "only {checked} links");
}

/// The files that the profile `observability` of compose.yaml mounts.
fn observability(file: &str) -> String {
    std::fs::read_to_string(format!("{}/docker/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

#[test]
fn every_alert_has_a_test_in_which_it_fires() {
    let alerts: serde_yaml::Value = serde_yaml::from_str(&observability("alerts.yml")).unwrap();
    let tests: serde_yaml::Value = serde_yaml::from_str(&observability("alerts.test.yml")).unwrap();
    let cases =
        tests["tests"].as_sequence().unwrap().iter().flat_map(|test| test["alert_rule_test"].as_sequence().unwrap());
    let firing = cases.filter(|case| !case["exp_alerts"].as_sequence().unwrap().is_empty());
    let firing: BTreeSet<_> = firing.map(|case| case["alertname"].as_str().unwrap()).collect();
    let rules = alerts["groups"][0]["rules"].as_sequence().unwrap();
    assert_eq!(rules.iter().map(|rule| rule["alert"].as_str().unwrap()).collect::<BTreeSet<_>>(), firing);
}

/// Every expression in the alerts and on the dashboard, for all instances and pools.
pub(crate) fn expressions() -> Vec<String> {
    let alerts: serde_yaml::Value = serde_yaml::from_str(&observability("alerts.yml")).unwrap();
    let rules = alerts["groups"][0]["rules"].as_sequence().unwrap().iter().map(|rule| rule["expr"].as_str().unwrap());
    let dashboard: serde_json::Value = serde_json::from_str(&observability("grafana/dashboards/ringway.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    let all = rules.chain(panels.map(|target| target["expr"].as_str().unwrap()));
    all.map(|expression| expression.replace("$instance", ".*").replace("$pool", ".*").replace("$__rate_interval", "1m"))
        .collect()
}

#[test]
fn alerts_and_dashboard_ask_only_for_metrics_that_there_are() {
    let expressions = expressions();
    assert!(expressions.len() > 20);
    for expression in expressions {
        let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for name in words.filter(|word| word.starts_with("ringway_")) {
            let is_known = metrics::ALL.iter().any(|metric| {
                metric.name == name
                    || (metric.kind == metrics::Kind::Histogram && name == format!("{}_bucket", metric.name))
            });
            assert!(is_known, "{name} in {expression}");
        }
    }
}

#[test]
fn promtool_is_content_with_rules_and_dashboard() {
    let folder = tempfile::tempdir().unwrap();
    let as_rules = expressions()
        .into_iter()
        .enumerate()
        .map(|(n, expression)| serde_json::json!({ "record": format!("expression:{n}"), "expr": expression }));
    let rules = serde_json::json!({ "groups": [{ "name": "all", "rules": as_rules.collect::<Vec<_>>() }] });
    let file = folder.path().join("rules.yml");
    std::fs::write(&file, rules.to_string()).unwrap();
    let docker = concat!(env!("CARGO_MANIFEST_DIR"), "/docker");
    for (kind, file) in [
        (&["check", "rules"][..], file.display().to_string()),
        (&["check", "rules"], format!("{docker}/alerts.yml")),
        (&["test", "rules"], format!("{docker}/alerts.test.yml")),
        (&["check", "config", "--syntax-only"], format!("{docker}/prometheus.yml")),
    ] {
        let output = std::process::Command::new("promtool").args(kind).arg(&file).output();
        let Ok(output) = output else {
            assert!(std::env::var_os("CI").is_none(), "the gate installs promtool");
            println!("promtool is not installed (Debian: prometheus): nothing checked");
            return;
        };
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "{file}: {said}");
    }
}
