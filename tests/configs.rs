//! The fixture folders and the examples: every invalid config yields its messages, and every valid one loads.
//!
//! An invalid config lists its faults in comments: each line `# fault: <text>` must match one fault, and the config
//! must have no other faults.

use std::path::{Path, PathBuf};

use ringway::config::{Config, Error};

fn fixtures(kind: &str) -> Vec<PathBuf> {
    files(&format!("tests/configs/{kind}"))
}

/// The files of a folder of the repository, in the order of their names.
fn files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn invalid_configs_are_refused_with_key_path_and_remedy() {
    let files = fixtures("invalid");
    assert!(files.len() >= 20, "only {} fixtures", files.len());
    for file in files {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&file).unwrap();
        let expected: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# fault: ")).collect();
        assert!(!expected.is_empty(), "{name} does not say what is wrong with it");
        let faults: Vec<String> = match Config::load(&file) {
            Ok(_) => panic!("{name} is taken for valid"),
            Err(Error::Faulty { faults, .. }) => faults.iter().map(ToString::to_string).collect(),
            Err(error) => vec![error.to_string()],
        };
        for expected in &expected {
            assert!(
                faults.iter().any(|fault| fault.contains(expected)),
                "{name}: {expected:?} is not among\n{faults:#?}"
            );
        }
        assert_eq!(faults.len(), expected.len(), "{name}: {faults:#?}");
    }
}

#[test]
fn valid_configs_load_and_survive_being_printed() {
    let mut files = fixtures("valid");
    files.extend(["config.yaml", "docker/ringway.yaml"].map(|file| Path::new(env!("CARGO_MANIFEST_DIR")).join(file)));
    for file in files {
        let config = Config::load(&file).unwrap_or_else(|error| panic!("{error}"));
        let printed = config.to_yaml();
        assert_eq!(Config::parse(&printed, "printed").unwrap(), config, "{printed}");
    }
}

#[test]
fn every_example_is_valid() {
    let mut examples = files("examples");
    examples.retain(|file| file.extension().is_some_and(|extension| extension == "yaml"));
    assert!(!examples.is_empty(), "examples/ contains no config");
    for file in examples {
        if let Err(error) = Config::load(&file) {
            panic!("{}: {error}", file.display());
        }
    }
}
