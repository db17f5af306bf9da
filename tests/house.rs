//! Rules for the source that the compiler does not check.

use std::path::{Path, PathBuf};

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// Timeouts, drains, checks and backoffs use `Instant`, so a change of the wall clock has no effect on them.
#[test]
fn only_what_people_read_has_the_time_of_the_wall_clock() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let reads_wall_clock = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).unwrap();
        ["SystemTime", "UNIX_EPOCH", "ClockId::Realtime", "chrono"].iter().any(|word| text.contains(word))
    };
    let mut found: Vec<_> = sources(&source).into_iter().filter(reads_wall_clock).collect();
    found.sort();
    let logs = ["cli/logging.rs", "events.rs", "proxy/access_log.rs"];
    assert_eq!(found, logs.map(|file| source.join(file)));
}

/// The data plane does not use providers, YAML, HTTP or Docker, and the control plane does not use connections.
#[test]
fn the_data_plane_and_the_control_plane_do_not_name_each_other() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for (half, foreign) in [
        ("proxy", &["crate::control", "crate::config", "crate::api", "crate::app", "bollard", "axum", "hyper"][..]),
        ("control", &["crate::proxy", "crate::config", "crate::api", "crate::app", "axum"][..]),
        ("api", &["crate::config", "crate::app"][..]),
    ] {
        for path in sources(&source.join(half)) {
            // The format of a header is a leaf, which both use.
            let text = std::fs::read_to_string(&path).unwrap().replace("crate::proxy_header", "");
            let named: Vec<_> = foreign.iter().filter(|name| text.contains(**name)).collect();
            assert!(named.is_empty(), "{} names {named:?}", path.display());
        }
    }
}
