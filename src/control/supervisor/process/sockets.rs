//! The Unix sockets of replicas that are child processes.

use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::address::Address;

/// Name of a replica's socket in its folder.
const NAME: &str = "socket";

/// Creates a folder for the socket of one replica and returns the socket's address. Only Ringway's user may enter the
/// folder. It goes with the replica: see [`remove`].
///
/// The folder is in the first of these that is set: `RUNTIME_DIRECTORY` (systemd's `RuntimeDirectory=`),
/// `XDG_RUNTIME_DIR`, `TMPDIR`; otherwise in `/tmp`.
///
/// # Errors
/// When the folder cannot be created, or its path is too long for a socket. The text names the folder and the remedy.
pub(super) fn create() -> io::Result<Address> {
    static CREATED: AtomicU64 = AtomicU64::new(0);
    let parent = parent();
    loop {
        // Another process with this id may have left a folder behind, or an earlier Ringway in another namespace.
        let number = CREATED.fetch_add(1, Ordering::Relaxed);
        let folder = parent.join(format!("ringway-{}-{number}", std::process::id()));
        let path = folder.join(NAME);
        let address = path.to_str().ok_or_else(|| "is not UTF-8".to_owned()).and_then(Address::of_path);
        let failed = |problem: String| {
            let what = "; set RUNTIME_DIRECTORY to a folder for sockets";
            io::Error::other(format!("cannot create a socket in {}: {problem}{what}", parent.display()))
        };
        let address = address.map_err(failed)?;
        match std::fs::DirBuilder::new().mode(0o700).create(&folder) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            created => return created.map(|()| address).map_err(|error| failed(error.to_string())),
        }
    }
}

fn parent() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    // systemd separates several folders by colons.
    let first = |list: std::ffi::OsString| std::env::split_paths(&list).next();
    let runtime = set("RUNTIME_DIRECTORY").and_then(first).or_else(|| set("XDG_RUNTIME_DIR").map(PathBuf::from));
    runtime.unwrap_or_else(std::env::temp_dir)
}

/// The folder of a replica's socket; `None` if the replica listens on a port.
pub(super) fn folder(address: &Address) -> Option<Arc<Path>> {
    if let Address::Unix(path) = address { path.parent().map(Into::into) } else { None }
}

/// Removes the folder of a replica that has ended, with everything in it. The [shim](crate::control::supervisor::shim)
/// does the same, for a Ringway that was killed.
pub(super) fn remove(address: &Address) {
    if let Some(folder) = folder(address) {
        // Fails if the shim has removed it.
        let _ = std::fs::remove_dir_all(folder);
    }
}
