//! Where a config comes from: a file, or the binary. Reads the text.

use std::fs::File;
use std::hash::{Hash as _, Hasher as _};
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};

use seahash::SeaHasher;

use super::document::Document;
use super::{Api, Config, Error, Place};
use crate::file_watch;

/// The config that is built into the binary: the repository's `config.yaml`.
pub const BUILT_IN: &str = include_str!("../../config.yaml");

/// The files that Ringway looks for without `--config`, in this order.
pub const USUAL_FILES: [&str; 2] = ["config.yaml", "/etc/ringway/config.yaml"];

/// Largest config file in bytes: a million backends fit.
const LARGEST: u64 = 64 << 20;

/// The source of a config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A config file.
    File(PathBuf),
    /// The config that is built into the binary, [`BUILT_IN`].
    BuiltIn,
}

impl Source {
    /// The source of a config: this file, else the first of [`USUAL_FILES`] that exists, else the built-in config.
    pub fn find(file: Option<PathBuf>) -> Self {
        let usual = || USUAL_FILES.iter().map(PathBuf::from).find(|file| file.exists());
        file.or_else(usual).map_or(Self::BuiltIn, Self::File)
    }

    /// Reads and validates the config.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read or does not contain a valid config.
    pub fn load(&self) -> Result<Config, Error> {
        self.document()?.config()
    }

    /// The section `api` of the config. The other sections may be wrong.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, is not valid YAML or has a fault in this section.
    pub fn api(&self) -> Result<Api, Error> {
        match self {
            Self::File(path) => Document::read_main(path)?.api(),
            Self::BuiltIn => self.document()?.api(),
        }
    }

    /// The config as YAML, with its included files and without variables. [`Config::parse`] reads it.
    ///
    /// # Errors
    /// Returns an error if a file cannot be read or is not valid YAML.
    pub fn rendered(&self) -> Result<String, Error> {
        self.document()?.rendered()
    }

    /// Where the config has this key path, or the closest section around it; `None` if it has neither, or if the source cannot be
    /// read.
    pub fn place(&self, key_path: &str) -> Option<Place> {
        self.places(&[key_path]).pop().flatten()
    }

    /// As [`Source::place`], for several key paths. Reads the source once.
    pub fn places(&self, key_paths: &[&str]) -> Vec<Option<Place>> {
        // Reading a pipe again could take forever.
        let is_readable = matches!(self, Self::File(path) if path.is_file()) || *self == Self::BuiltIn;
        let Some(document) = is_readable.then(|| self.document().ok()).flatten() else {
            return vec![None; key_paths.len()];
        };
        let places = document.places();
        key_paths.iter().map(|key_path| places.closest(key_path)).collect()
    }

    /// The path of the file, absolute; `None` for the built-in config.
    pub fn path(&self) -> Option<PathBuf> {
        match self {
            Self::File(path) => Some(std::path::absolute(path).unwrap_or_else(|_| path.clone())),
            Self::BuiltIn => None,
        }
    }

    /// The files and folders on which the config depends, and a hash of the contents of the files. `before` are those of an earlier call:
    /// a file with faults may not show on which others it depends.
    pub fn watched(&self, before: &[PathBuf]) -> (Vec<PathBuf>, u64) {
        let Self::File(main) = self else { return (Vec::new(), 0) };
        // Reading a pipe could take forever.
        let document = if main.is_file() { Document::read(main).ok() } else { None };
        let files = match document {
            Some(document) => std::iter::once(main.clone()).chain(document.parts()).collect(),
            None if before.is_empty() => vec![main.clone()],
            None => before.to_vec(),
        };
        let mut hasher = SeaHasher::new();
        for file in &files {
            // A folder has no content of its own: the files that count in it are in the list.
            file.hash(&mut hasher);
            file_watch::content(file).hash(&mut hasher);
        }
        (files, hasher.finish())
    }

    fn document(&self) -> Result<Document, Error> {
        match self {
            Self::File(path) => Document::read(path),
            Self::BuiltIn => Document::parse(BUILT_IN.to_owned(), &self.to_string()),
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::BuiltIn => f.write_str("the built-in config"),
        }
    }
}

/// Reads a file as text.
pub(super) fn read(path: &Path) -> Result<String, Error> {
    let unreadable = |problem: String| Error::Unreadable { path: path.to_owned(), problem };
    let of_system = |error: std::io::Error| unreadable(error.to_string());
    let mut file = File::open(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => unreadable("the file does not exist".to_owned()),
        ErrorKind::PermissionDenied => unreadable("Ringway's user may not read the file".to_owned()),
        _ => of_system(error),
    })?;
    if file.metadata().map_err(of_system)?.is_dir() {
        return Err(unreadable("is a directory: give the path of a file in it".to_owned()));
    }
    let mut bytes = Vec::new();
    file.by_ref().take(LARGEST + 1).read_to_end(&mut bytes).map_err(of_system)?;
    if bytes.len() as u64 > LARGEST {
        return Err(unreadable(format!("is larger than {} MiB", LARGEST >> 20)));
    }
    text(bytes).map_err(|problem| unreadable(problem.to_owned()))
}

/// Decodes UTF-8. Editors on Windows may write a byte order mark before it.
fn text(bytes: Vec<u8>) -> Result<String, &'static str> {
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return Err("is UTF-16 text: save it as UTF-8");
    }
    match String::from_utf8(bytes) {
        Ok(text) if text.contains('\0') => Err("is a binary file: give a YAML file"),
        Ok(text) => Ok(text.strip_prefix('\u{feff}').map_or_else(|| text.clone(), str::to_owned)),
        Err(error) if error.as_bytes().contains(&0) => Err("is a binary file: give a YAML file"),
        Err(_) => Err("is not UTF-8 text: save it as UTF-8"),
    }
}
