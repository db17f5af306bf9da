//! Commands, exit codes and error messages.

use crate::harness::backends::Server;
use crate::harness::program::{Killed, Program, file, run};
use crate::harness::{THREE_REPLICAS, config, require_tool, static_config};
use ringway::config::Config;

/// Runs `ringway` with this config. Returns its exit code and standard error.
fn run_config(yaml: &str) -> (Option<i32>, String) {
    let file = file(yaml);
    let (code, _, stderr) = run(&["--config", file.path().to_str().unwrap()]);
    (code, stderr)
}

#[track_caller]
fn fails(yaml: &str, code: i32, parts: &[&str]) {
    let (got, stderr) = run_config(yaml);
    assert_eq!(got, Some(code), "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{stderr:?} lacks {part:?}");
    }
    assert_eq!(stderr.lines().filter(|line| line.starts_with("ringway:")).count(), 1, "{stderr}");
}

#[test]
fn an_error_of_the_system_is_one_line_and_exit_code_1() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let usual = config(THREE_REPLICAS, "", "");

    let port_taken = usual.replacen("listen: 127.0.0.1:0", &format!("listen: {address}"), 1);
    fails(&port_taken, 1, &["listeners[web].listen: cannot listen on", &address.to_string(), "choose another port"]);
    let api_taken = usual.replacen("\"127.0.0.1:0\"", &format!("{address}"), 1);
    fails(&api_taken, 1, &["api.listen: cannot listen on"]);
    let not_ours = usual.replacen("listen: 127.0.0.1:0", "listen: 192.0.2.1:8000", 1);
    fails(&not_ours, 1, &["listeners[web].listen", "does not have that address"]);
    let no_program = config("process: { replicas: 1, command: [no-such-program, \"{port}\"] }", "", "");
    fails(&no_program, 1, &[":9: pools[echo].provider.process.command", "\"no-such-program\"", "install it"]);
    let no_log = format!("access_log: {{ path: /no/such/folder/log }}\n{usual}");
    fails(&no_log, 1, &[":1: access_log.path: cannot write /no/such/folder/log"]);
}

/// The outcome of `ringway check` on this config: exit code, standard output and standard error.
fn check(yaml: &str, options: &[&str]) -> (Option<i32>, String, String) {
    let file = file(yaml);
    run(&[&["check", file.path().to_str().unwrap()], options].concat())
}

#[test]
fn check_warns_of_backends_that_nobody_can_find() {
    let yaml = config("static: [{ address: \"127.0.0.1:80\" }, { address: \"no-such-host.invalid:80\" }]", "", "");
    let (code, stdout, stderr) = check(&yaml, &[]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.ends_with(": valid\n"), "{stdout}");
    let warning = "pools[echo].provider.static[no-such-host.invalid:80].address: cannot resolve";
    assert!(stderr.starts_with("ringway: warning: ") && stderr.contains(warning), "{stderr}");
    let (code, _, stderr) = check(&yaml, &["--offline"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    let alone = config("static: [{ address: \"no-such-host.invalid:80\" }]", "", "");
    let (code, _, stderr) = check(&alone, &[]);
    assert!(code == Some(0) && stderr.contains(warning), "{stderr}");
    for (provider, warning) in [
        ("dns: { name: no.such.invalid., port: 80, servers: [\"127.0.0.1:9\"] }", "provider.dns: the look-up failed"),
        ("file: { path: /no/such/list }", "provider.file.path: /no/such/list: the file does not exist"),
    ] {
        let (code, _, stderr) = check(&config(provider, "", ""), &[]);
        assert!(code == Some(0) && stderr.starts_with("ringway: warning: ") && stderr.contains(warning), "{stderr}");
    }
}

#[test]
fn check_finds_what_would_keep_ringway_from_starting() {
    let usual = config(THREE_REPLICAS, "", "");
    let no_program = config("process: { replicas: 1, command: [no-such-program, \"{port}\"] }", "", "");
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("access.log");
    for (yaml, part) in [
        (no_program.clone(), "pools[echo].provider.process.command: cannot find an executable program"),
        (format!("access_log: {{ path: /no/such/folder/log }}\n{usual}"), ":1: access_log.path: cannot write"),
        (format!("access_log: {{ path: {} }}\n{usual}", folder.path().display()), "is a directory"),
        (usual.replace("api: {", "api: { token_file: /no/such/token,"), "api.token_file: /no/such/token"),
        (
            usual.replacen("listen: 127.0.0.1:0", "listen: 192.0.2.1:8000", 1),
            "listeners[web].listen: cannot listen on 192.0.2.1:8000",
        ),
        (
            usual.replacen("listen: 127.0.0.1:0", "listen: unix:/no/such/folder/socket", 1),
            "the directory does not exist",
        ),
    ] {
        let (code, stdout, stderr) = check(&yaml, &[]);
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{yaml}\n{stderr}");
        assert!(stderr.contains(part) && stderr.lines().count() == 1, "{stderr:?} lacks {part:?}");
        let (code, _, stderr) = check(&yaml, &["--offline"]);
        assert_eq!((code, stderr.as_str()), (Some(0), ""));
    }
    // All at once, and without a trace.
    let two = format!("access_log: {{ path: /no/such/folder/log }}\n{no_program}");
    let (_, _, stderr) = check(&two, &[]);
    assert!(
        stderr.contains("2 errors") && stderr.contains("access_log.path") && stderr.contains("no-such-program"),
        "{stderr}"
    );
    let (code, _, _) = check(&format!("access_log: {{ path: {} }}\n{usual}", log.display()), &[]);
    assert!(code == Some(0) && !log.exists());
}

#[test]
fn check_warns_of_limits_above_the_limit_on_open_files() {
    let yaml = format!("max_connections: 900000\n{}", config(THREE_REPLICAS, "", ""));
    let file = file(&yaml);
    let limited = |files: u32| {
        let output = std::process::Command::new("sh")
            .args(["-c", &format!("ulimit -n {files}; exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_ringway"), "check"])
            .arg(file.path())
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, stderr) = limited(1000);
    assert!(
        code == Some(0) && stderr.contains(":1: max_connections: 900000 is more than the limit on open files (1000)"),
        "{stderr}"
    );
    let (code, stderr) = limited(64);
    assert!(code == Some(1) && stderr.contains("the limit on open files is 64: raise the limit"), "{stderr}");
}

#[test]
fn commands_work_with_a_config_that_is_wrong_outside_of_its_section_api() {
    let nobody = crate::harness::backends::Refusing::new();
    let broken = file(&format!("api: {{ listen: \"{}\" }}\npools: many\n", nobody.address));
    let path = broken.path().to_str().unwrap();
    let (code, _, stderr) = run(&["status", "--config", path]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains(&format!("cannot reach the side port at {}", nobody.address)), "{stderr}");
    let (_, _, stderr) = run(&["drain", "a/b", "--api", &format!("localhost:{}", nobody.address.port())]);
    assert!(stderr.contains("cannot reach the side port at localhost:"), "{stderr}");
    let (code, _, stderr) = run(&["status", "--api", "http://localhost:8001"]);
    assert!(code == Some(2) && stderr.contains("write localhost:8001 without http://"), "{stderr}");
}

/// The test drops root, because root may bind every port.
#[test]
fn a_port_without_permission_is_an_error_and_exit_code_1() {
    let yaml = config(THREE_REPLICAS, "", "").replacen("listen: 127.0.0.1:0", "listen: 127.0.0.1:81", 1);
    let folder = tempfile::tempdir().unwrap();
    let (binary, config) = (folder.path().join("ringway"), folder.path().join("config.yaml"));
    std::fs::copy(env!("CARGO_BIN_EXE_ringway"), &binary).unwrap();
    std::fs::write(&config, yaml).unwrap();
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let is_root = rustix::process::geteuid().is_root();
    if is_root && !require_tool("setpriv") {
        return;
    }
    let mut command = if is_root {
        let mut command = std::process::Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all"]).arg(&binary);
        command
    } else {
        std::process::Command::new(&binary)
    };
    let lowest = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap();
    if lowest.trim() != "1024" {
        println!("skipped: every user may bind port 81 on this system");
        return;
    }
    let output = command.arg("--config").arg(&config).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("listeners[web].listen: cannot listen on 127.0.0.1:81: Permission denied"), "{stderr}");
    assert!(stderr.contains("CAP_NET_BIND_SERVICE"), "{stderr}");
}

#[test]
fn bad_arguments_and_bad_configs_are_exit_code_2() {
    for arguments in [&["--no-such-flag"][..], &["dance"], &["--log-format", "xml"], &["--config", "/no/such/file"]] {
        let (code, _, stderr) = run(arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {stderr}");
    }
    let (code, stderr) = run_config("listeners: []\nworkers: many\n");
    assert_eq!(code, Some(2));
    for fault in ["3 errors", "workers: \"many\" is neither auto", "listeners: is empty", "pools: missing"] {
        assert!(stderr.contains(fault), "{stderr:?} lacks {fault:?}");
    }
    for filter in ["ringway=loud", "debgu"] {
        let (code, _, stderr) = run(&["--log", filter, "--config", "config.yaml"]);
        assert_eq!(code, Some(2), "{stderr}");
    }
}

#[test]
fn check_prints_a_config_that_loads_as_the_same_config() {
    let (code, stdout, stderr) = run(&["check", "--print", "config.yaml"]);
    assert_eq!(code, Some(0), "{stderr}");
    let again = Config::parse(&stdout, "check").unwrap();
    assert_eq!(again, Config::load("config.yaml".as_ref()).unwrap());
    assert!(stdout.contains("user_timeout: 0s"), "check prints the defaults:\n{stdout}");
}

#[test]
fn without_a_config_file_the_built_in_one_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_ringway"))
        .args(["check", "--print"])
        .current_dir(folder.path())
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.starts_with("# the built-in config"), "{printed}");
    assert_eq!(Config::parse(&printed, "check").unwrap(), Config::load("config.yaml".as_ref()).unwrap());
}

#[tokio::test]
async fn status_is_a_table_or_json() {
    let server = Server::echo("a").await;
    let program = Program::start(&static_config(&[server.address], "")).await.ready().await;
    let api = program.api().to_string();
    let (code, stdout, stderr) = tokio::task::spawn_blocking({
        let api = api.clone();
        move || run(&["status", "--api", &api])
    })
    .await
    .unwrap();
    assert_eq!(code, Some(0), "{stderr}");
    let row = stdout.lines().find(|line| line.starts_with("echo")).unwrap_or_else(|| panic!("{stdout}"));
    for cell in ["b0", "healthy", &server.address.to_string(), "100.0 %", "ok"] {
        assert!(row.contains(cell), "{row:?} lacks {cell:?}");
    }
    let (code, stdout, _) = run(&["status", "--json", "--api", &api]);
    assert_eq!(code, Some(0));
    assert!(serde_json::from_str::<serde_json::Value>(&stdout).unwrap()["pools"].is_array());
}

#[test]
fn init_writes_a_config_that_is_valid_and_overwrites_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for kind in ["static", "process", "docker"] {
        let file = folder.path().join(format!("{kind}.yaml"));
        let path = file.to_str().unwrap();
        let (code, stdout, stderr) = run(&["init", kind, "--output", path]);
        assert!(code == Some(0) && stdout.contains(&format!("ringway check {path}")), "{stdout}{stderr}");
        let (code, _, stderr) = run(&["check", "--offline", path]);
        assert_eq!(code, Some(0), "{stderr}");
        let before = std::fs::read(&file).unwrap();
        let (code, _, stderr) = run(&["init", "static", "--output", path]);
        assert!(code == Some(1) && stderr.contains("exists already"), "{stderr}");
        assert_eq!(std::fs::read(&file).unwrap(), before);
        let (_, printed, _) = run(&["init", kind, "--output", "-"]);
        assert_eq!(printed.as_bytes(), before);
    }
}

#[test]
fn packagers_and_editors_get_completions_manual_pages_and_a_schema() {
    let (code, schema, stderr) = run(&["schema"]);
    assert!(code == Some(0) && stderr.is_empty(), "{stderr}");
    let schema: serde_json::Value = serde_json::from_str(&schema).unwrap();
    let config: serde_yaml::Value = serde_yaml::from_str(include_str!("../config.yaml")).unwrap();
    let config = serde_json::to_value(config).unwrap();
    assert!(jsonschema::draft202012::new(&schema).unwrap().is_valid(&config));
    assert!(jsonschema::draft202012::meta::is_valid(&schema));
    assert!(run(&["schema", "--markdown"]).1.starts_with("| key |"));

    for shell in ["bash", "zsh", "fish"] {
        let (code, stdout, _) = run(&["completions", shell]);
        assert!(code == Some(0) && stdout.contains("undrain"), "{shell}");
    }
    let folder = tempfile::tempdir().unwrap();
    let (code, _, stderr) = run(&["man", folder.path().to_str().unwrap()]);
    assert_eq!(code, Some(0), "{stderr}");
    let page = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    assert!(page("ringway.1").contains(".TH ringway 1") && page("ringway-drain.1").contains("within"));
    let (code, _, stderr) = run(&["man", "/no/such/folder"]);
    assert!(code == Some(1) && stderr.contains("cannot write to /no/such/folder"), "{stderr}");
}

#[test]
fn status_without_a_running_ringway_is_an_error() {
    let nobody = crate::harness::backends::Refusing::new();
    let (code, _, stderr) = run(&["status", "--api", &nobody.address.to_string()]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("check that Ringway runs there"), "{stderr}");
}

#[tokio::test]
async fn json_logs_are_json() {
    let server = Server::echo("a").await;
    let file = file(&static_config(&[server.address], ""));
    let mut child = Killed(
        std::process::Command::new(env!("CARGO_BIN_EXE_ringway"))
            .args(["--log-format", "json", "--config"])
            .arg(file.path())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let line = tokio::task::spawn_blocking({
        let stderr = child.0.stderr.take().unwrap();
        move || {
            let mut line = String::new();
            std::io::BufRead::read_line(&mut std::io::BufReader::new(stderr), &mut line).unwrap();
            line
        }
    });
    let line = crate::harness::soon("a line", line).await.unwrap();
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert!(line["level"] == "INFO" && line["fields"]["message"].is_string(), "{line}");
    assert_eq!(line["pid"], child.0.id());
}

#[test]
fn check_warns_of_what_is_hardly_meant() {
    let file = "tests/configs/valid/literal_escapes.yaml";
    let (code, _, stderr) = run(&["check", "--offline", file]);
    assert_eq!(code, Some(0), "{stderr}");
    let warning = format!("warning: {file}:6: pools[p].health_check: has a backslash before a letter");
    assert!(stderr.contains(&warning) && stderr.contains("\"PING\\r\\n\""), "{stderr}");
}

#[tokio::test]
async fn commands_that_name_the_wrong_thing_say_so() {
    let server = Server::echo("a").await;
    let program = Program::start(&static_config(&[server.address], "")).await.ready().await;
    let api = program.api().to_string();
    let (code, _, stderr) =
        tokio::task::spawn_blocking(move || run(&["reload", "--config", "config.yaml", "--api", &api])).await.unwrap();
    assert_eq!(code, Some(1));
    assert!(stderr.contains("a reload reads the file that Ringway was started with"), "{stderr}");
    let open = tokio::net::TcpStream::connect(program.web()).await.unwrap();
    let api = program.api().to_string();
    crate::harness::eventually_async("the session of a backend as other commands write it", async || {
        let api = api.clone();
        let list = move || run(&["sessions", "--backend", "echo/b0", "--api", &api]);
        tokio::task::spawn_blocking(list).await.unwrap().1.contains("127.0.0.1")
    })
    .await;
    drop(open);
    let api = program.api().to_string();
    let drain = move || run(&["drain", "echo/b0", "--api", &api]);
    let (code, stdout, _) = tokio::task::spawn_blocking(drain).await.unwrap();
    assert_eq!(code, Some(0));
    // The keys have nowhere to go.
    assert!(stdout.contains("No other backend of the pool is healthy") && !stdout.contains("keys move"), "{stdout}");
    let api = program.api().to_string();
    let (_, said, _) = tokio::task::spawn_blocking(move || run(&["status", "--api", &api])).await.unwrap();
    assert!(said.contains("pool echo: no healthy backend, so Ringway resets new connections"), "{said}");
    assert!(said.lines().any(|line| line.contains(" draining ") && line.trim_end().ends_with("drained")), "{said}");
}
