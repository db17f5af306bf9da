//! A headless Chromium, driven by the `WebDriver` protocol (W3C) of its `chromedriver`.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{eventually_async, http_with, require_tool};

/// The name of an element in the protocol.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// A browser with one page. Dropping it ends all of its processes.
pub(crate) struct Browser {
    driver: Child,
    address: SocketAddr,
    session: String,
    profile: TempDir,
}

impl Browser {
    /// Starts a browser with a window of this size; `None` if it is not installed and this is not CI.
    pub(crate) async fn start(width: u32, height: u32) -> Option<Self> {
        if !require_tool("chromedriver") || !require_tool("chromium") {
            return None;
        }
        let profile = tempfile::tempdir().unwrap();
        // A group of its own, so the drop ends the browser's processes too.
        let mut command = Command::new("chromedriver");
        let mut driver =
            command.arg("--port=0").process_group(0).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines();
        let port = tokio::task::spawn_blocking(move || {
            let line = lines.find_map(|line| line.ok().filter(|line| line.contains("started successfully on port")));
            // The driver must be able to go on writing.
            std::thread::spawn(move || lines.for_each(drop));
            line
        });
        let line = super::soon("the driver's port", port).await.unwrap().expect("the driver starts");
        let port: u16 = line.rsplit(' ').next().unwrap().trim_end_matches('.').parse().unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mut browser = Self { driver, address, session: String::new(), profile };
        let arguments = [
            "--headless=new".to_owned(),
            "--no-sandbox".to_owned(),
            "--disable-gpu".to_owned(),
            "--disable-dev-shm-usage".to_owned(),
            format!("--window-size={width},{height}"),
            format!("--user-data-dir={}", browser.profile.path().display()),
        ];
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "goog:chromeOptions": { "args": arguments },
            "goog:loggingPrefs": { "browser": "ALL" },
        } } });
        let session = browser.call("POST", "/session", &wanted).await;
        browser.session.push_str(session["sessionId"].as_str().unwrap_or_else(|| panic!("{session}")));
        Some(browser)
    }

    /// One call of the protocol. Panics if the driver refuses it.
    async fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        let host = self.address.to_string();
        let body = if method == "GET" { Vec::new() } else { body.to_string().into_bytes() };
        let headers = [("host", host.as_str()), ("content-type", "application/json")];
        let answer = http_with(self.address, method, path, &headers, &body).await;
        let value: Value = serde_json::from_slice(answer.body()).unwrap();
        assert!(answer.status().is_success(), "{method} {path}: {value}");
        value["value"].clone()
    }

    async fn in_session(&self, method: &str, path: &str, body: &Value) -> Value {
        self.call(method, &format!("/session/{}{path}", self.session), body).await
    }

    pub(crate) async fn open(&self, url: &str) {
        self.in_session("POST", "/url", &json!({ "url": url })).await;
    }

    /// Runs a script's body in the page, and returns its value.
    pub(crate) async fn script(&self, script: &str) -> Value {
        self.in_session("POST", "/execute/sync", &json!({ "script": script, "args": [] })).await
    }

    /// As [`Browser::script`], for a script that calls its last argument with the value.
    pub(crate) async fn script_async(&self, script: &str) -> Value {
        self.in_session("POST", "/execute/async", &json!({ "script": script, "args": [] })).await
    }

    /// Waits until a script's body returns `true`.
    pub(crate) async fn until(&self, what: &str, script: &str) {
        eventually_async(what, async || self.script(script).await == true).await;
    }

    /// Clicks on the first element of a selector, as a mouse would: it must be visible.
    pub(crate) async fn click(&self, selector: &str) {
        let query = json!({ "using": "css selector", "value": selector });
        let element = self.in_session("POST", "/element", &query).await;
        let id = element[ELEMENT].as_str().unwrap().to_owned();
        self.in_session("POST", &format!("/element/{id}/click"), &json!({})).await;
    }

    /// Presses keys one after the other. `\u{e004}` is Tab, `\u{e007}` Enter, `\u{e00c}` Escape.
    pub(crate) async fn keys(&self, keys: &str) {
        let presses = keys
            .chars()
            .flat_map(|key| ["keyDown", "keyUp"].map(|kind| json!({ "type": kind, "value": key.to_string() })));
        let actions =
            json!({ "actions": [{ "type": "key", "id": "keyboard", "actions": presses.collect::<Vec<_>>() }] });
        self.in_session("POST", "/actions", &actions).await;
    }

    /// Makes the page believe that the user prefers light or dark colours.
    pub(crate) async fn emulate(&self, scheme: &str) {
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        let command = json!({ "cmd": "Emulation.setEmulatedMedia", "params": { "features": features } });
        self.in_session("POST", "/goog/cdp/execute", &command).await;
    }

    /// What the page has written to the console as warnings and errors, refused resources included.
    pub(crate) async fn complaints(&self) -> Vec<String> {
        let log = self.in_session("POST", "/se/log", &json!({ "type": "browser" })).await;
        let entries = log.as_array().cloned().unwrap_or_default();
        entries.iter().filter_map(|entry| entry["message"].as_str().map(str::to_owned)).collect()
    }

    /// A picture of the window, as a PNG file.
    pub(crate) async fn picture(&self, file: &Path) {
        use std::io::Write as _;

        let encoded = self.in_session("GET", "/screenshot", &json!({})).await;
        let mut decoder = Command::new("base64")
            .arg("-d")
            .stdin(Stdio::piped())
            .stdout(std::fs::File::create(file).unwrap())
            .spawn()
            .unwrap();
        decoder.stdin.take().unwrap().write_all(encoded.as_str().unwrap().as_bytes()).unwrap();
        assert!(decoder.wait().unwrap().success());
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = kill_process_group(Pid::from_child(&self.driver), Signal::KILL);
        let _ = self.driver.wait();
    }
}
