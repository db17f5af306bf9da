//! Rules of the house that no compiler keeps.

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

/// A clock that is set back or forward must change nothing: timeouts, drains, checks and back-offs go by `Instant`.
#[test]
fn nobody_reads_wall_time_but_the_access_log() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let reads_it = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).unwrap();
        ["SystemTime", "UNIX_EPOCH", "clock_gettime", "chrono"].iter().any(|word| text.contains(word))
    };
    let found: Vec<_> = sources(&source).into_iter().filter(reads_it).collect();
    assert_eq!(found, [source.join("proxy/access_log.rs")]);
}

/// The data plane knows nothing of providers, YAML, HTTP or Docker, and the control plane nothing of connections.
#[test]
fn the_two_halves_do_not_name_each_other() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for (half, strangers) in [
        ("proxy", &["crate::control", "crate::config", "crate::api", "crate::app", "bollard", "axum", "hyper"][..]),
        ("control", &["crate::proxy", "crate::config", "crate::api", "crate::app", "axum"][..]),
        ("api", &["crate::config", "crate::app"][..]),
    ] {
        for path in sources(&source.join(half)) {
            let text = std::fs::read_to_string(&path).unwrap();
            let named: Vec<_> = strangers.iter().filter(|stranger| text.contains(**stranger)).collect();
            assert!(named.is_empty(), "{} names {named:?}", path.display());
        }
    }
}
