//! The Unix sockets of replicas that are child processes.

use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use crate::address::Address;

/// Begins the name of a socket's directory.
const PREFIX: &str = "ringway-";

/// Name of a replica's socket in its directory.
const NAME: &str = "socket";

/// Creates a directory for the socket of one replica and returns the socket's address. Only Ringway's user and root may
/// enter the directory. [`remove`] removes it when the replica has ended.
///
/// The directory is in the first of these that is set: `RUNTIME_DIRECTORY` (systemd's `RuntimeDirectory=`),
/// `XDG_RUNTIME_DIR`, `TMPDIR`; otherwise in `/tmp`.
///
/// # Errors
/// When the directory cannot be created, or its path is too long for a socket. The text names the parent directory and
/// the remedy.
pub(super) fn create() -> io::Result<Address> {
    let parent = parent();
    let created = create_in(&parent);
    created.map_err(|problem| {
        let parent = parent.display();
        let remedy = "set RUNTIME_DIRECTORY to a writable directory with a short path";
        io::Error::other(format!("cannot create a directory for a replica's socket in {parent}: {problem}; {remedy}"))
    })
}

fn create_in(parent: &Path) -> Result<Address, String> {
    // Nobody can guess the name and occupy it.
    let directory = parent.join(format!("{PREFIX}{:016x}", RandomState::new().hash_one(())));
    let path = directory.join(NAME);
    let address = Address::of_path(path.to_str().ok_or("the path is not UTF-8")?)?;
    std::fs::DirBuilder::new().mode(0o700).create(&directory).map_err(|error| error.to_string())?;
    Ok(address)
}

fn parent() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    // systemd separates several directories by colons.
    let first = |list: std::ffi::OsString| std::env::split_paths(&list).next();
    let runtime = set("RUNTIME_DIRECTORY").and_then(first).or_else(|| set("XDG_RUNTIME_DIR").map(PathBuf::from));
    runtime.unwrap_or_else(std::env::temp_dir)
}

/// The directory of a replica's socket; `None` if the replica listens on a port.
pub(super) fn directory(address: &Address) -> Option<&Path> {
    let Address::Unix(path) = address else { return None };
    // Another directory is not ours to remove.
    path.parent().filter(|parent| parent.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX)))
}

/// Removes the directory of a replica that has ended, with everything in it. The [shim](crate::control::supervisor::shim)
/// does the same, so the directory also goes when Ringway was killed.
pub(super) fn remove(address: &Address) {
    if let Some(directory) = directory(address) {
        // Fails if the shim has removed it.
        let _ = std::fs::remove_dir_all(directory);
    }
}
