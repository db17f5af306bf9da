//! The fixture folders and the examples: every invalid config yields its messages, and every valid one loads.
//!
//! An invalid config lists its faults in comments, `# fault: <line>: <text>`. It has these faults and no others. An included file
//! stands before its line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ringway::config::{Config, Error, Provider, Source};

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

/// The configs among the examples.
fn examples() -> Vec<PathBuf> {
    let mut examples = files("examples");
    examples.retain(|file| file.extension().is_some_and(|extension| extension == "yaml"));
    assert!(!examples.is_empty(), "examples/ contains no config");
    examples.extend(
        ["labels", "swarm", "kubernetes"]
            .map(|folder| Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("examples/{folder}/ringway.yaml"))),
    );
    examples
}

/// The faults of a config file, each with its line.
fn faults(file: &Path) -> Vec<String> {
    let own = format!("{}:", file.display());
    let folder = format!("{}/", file.parent().unwrap().display());
    let short = |text: String| text.strip_prefix(&own).unwrap_or(&text).replace(&folder, "").trim_start().to_owned();
    match Config::load(file) {
        Ok(_) => panic!("{} is taken for valid", file.display()),
        Err(Error::Faulty { faults, .. }) => faults.iter().map(|fault| short(fault.to_string())).collect(),
        Err(error) => vec![short(error.to_string())],
    }
}

#[test]
fn invalid_configs_are_refused_with_line_key_path_and_remedy() {
    let files = fixtures("invalid");
    assert!(files.len() >= 60, "only {} fixtures", files.len());
    let mut differ = Vec::new();
    for file in files.iter().filter(|file| file.is_file()) {
        let text = std::fs::read_to_string(file).unwrap();
        let mut expected: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# fault: ")).collect();
        let mut faults = faults(file);
        faults.sort();
        expected.sort_unstable();
        if faults != expected {
            differ.push(format!("{}\n  has      {faults:#?}\n  expected {expected:#?}", file.display()));
        }
    }
    assert!(differ.is_empty(), "{}", differ.join("\n"));
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
fn every_config_to_start_from_names_its_schema_for_editors() {
    let mut configs = examples();
    configs.extend(["config.yaml", "docker/ringway.yaml"].map(PathBuf::from));
    for file in configs {
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.starts_with("# yaml-language-server: $schema=ringway.schema.json\n"), "{}", file.display());
    }
}

#[test]
fn every_example_is_valid() {
    for file in examples() {
        if let Err(error) = Config::load(&file) {
            panic!("{}: {error}", file.display());
        }
    }
}

#[test]
fn anchors_variables_and_included_files_make_one_config() {
    let folder = fixtures("valid");
    let file = folder.iter().find(|file| file.ends_with("merged_and_included.yaml")).unwrap();
    let config = Config::load(file).unwrap_or_else(|error| panic!("{error}"));
    let names: Vec<_> = config.pools.iter().map(|pool| pool.name.as_str()).collect();
    assert_eq!(names, ["one", "two", "three", "part"]);
    assert_eq!(config.listeners.len(), 2);
    let [one, two, three, ..] = &config.pools[..] else { panic!() };
    assert_eq!((three.drain, three.slow_start), (Duration::from_secs(11), Duration::from_secs(22)));
    assert_eq!((one.timeouts.idle, one.drain), (None, Duration::from_secs(5)));
    assert_eq!(two.drain, Duration::from_secs(1), "the first of several merged sections wins");
    assert_eq!(two.health_check.as_ref().unwrap().interval, Duration::from_secs(5));
    assert_eq!(one.provider.static_backends().unwrap()[0].membership.weight, 3);
    let Provider::Process(process) = &two.provider else { panic!() };
    assert_eq!(process.spec.command[2], "exec server ${PORT}");
    let rate = config.listeners[0].per_source.rate.unwrap();
    assert_eq!((rate.count, rate.per, rate.burst), (30, Duration::from_secs(60), 30));
    let rendered = Source::File(file.clone()).rendered().unwrap();
    assert_eq!(Config::parse(&rendered, "rendered").unwrap(), config, "{rendered}");
}

#[test]
fn a_text_that_a_caller_sends_learns_no_variable_and_reads_no_file() {
    let with = |more: &str| {
        let yaml = format!(
            "{more}\nlisteners: [{{ name: web, listen: \"127.0.0.1:0\", pool: p }}]\npools: [{{ name: p, provider: {{ static: [{{ \
             address: \"10.0.0.1:80\" }}] }} }}]"
        );
        Config::parse(&yaml, "the config given").unwrap_err().to_string()
    };
    let error = with("access_log: { path: \"${PATH}\" }");
    assert!(error.contains("the config given:1: access_log.path: has the variable PATH"), "{error}");
    assert!(!error.contains(&std::env::var("PATH").unwrap()), "{error}");
    let error = with("include: /etc/passwd");
    assert!(error.contains("the config given:1: include: only a file can include others"), "{error}");
}

/// A config file with these bytes.
fn written(bytes: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    file
}

#[test]
fn a_file_that_is_no_text_is_refused_with_its_reason() {
    let utf16: Vec<u8> =
        std::iter::once(0xfeff_u16).chain("pools: []".encode_utf16()).flat_map(u16::to_le_bytes).collect();
    for (bytes, part) in [
        (&b"\x7fELF\x02\x01\0\0\xff"[..], "is a binary file: give a YAML file"),
        (b"a\0b", "is a binary file"),
        (&utf16, "is UTF-16 text: save it as UTF-8"),
        (b"name: caf\xe9", "is not UTF-8 text"),
        (b"", "the file is empty"),
        (b"# only a comment\n", "the file is empty"),
        (b"just text", "\"just text\" is not a config"),
    ] {
        let file = written(bytes);
        let error = Config::load(file.path()).unwrap_err().to_string();
        assert!(error.contains(part) && error.starts_with(&file.path().display().to_string()), "{error}");
    }
    let error = Config::load("tests".as_ref()).unwrap_err().to_string();
    assert_eq!(error, "tests: is a directory: give the path of a file in it");
    let error = Config::load("/dev/zero".as_ref()).unwrap_err().to_string();
    assert!(error.contains("is larger than"), "{error}");
    let error = Config::load("no/such/file".as_ref()).unwrap_err().to_string();
    assert_eq!(error, "no/such/file: the file does not exist");
}

#[test]
fn byte_order_marks_and_line_ends_of_windows_change_nothing() {
    let text = std::fs::read_to_string("config.yaml").unwrap();
    let file = written(format!("\u{feff}{}", text.replace('\n', "\r\n")).as_bytes());
    assert_eq!(Config::load(file.path()).unwrap(), Config::load("config.yaml".as_ref()).unwrap());
}

#[test]
fn two_backends_with_one_address_are_a_warning() {
    let with = |second: &str| {
        let backends = format!("[{{ address: \"10.0.0.1:80\", id: a }}, {{ address: \"{second}\", id: b }}]");
        let yaml = format!(
            "listeners: [{{ name: web, listen: \"127.0.0.1:0\", pool: p }}]\npools: [{{ name: p, provider: {{ static: {backends} }} }}]"
        );
        Config::parse(&yaml, "test").unwrap().warnings()
    };
    assert_eq!(with("10.0.0.2:80"), []);
    let [warning] = &with("10.0.0.1:80")[..] else { panic!() };
    assert_eq!(warning.path, "pools[p].provider.static[b]");
    assert!(warning.problem.starts_with("has the address of a: "), "{warning}");
}
