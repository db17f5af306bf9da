//! Starts replicas, each through a [shim](crate::control::supervisor::shim).

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use tokio::process::Command;

use super::lifeline::{Held, first_word};
use super::{Processes, sockets};
use crate::address::Address;
use crate::control::PRIVATE_VARIABLES;
use crate::control::supervisor::handover::{PORT, SLOT, SOCKET};
use crate::control::supervisor::plan::Place;

/// The name that stands for Ringway's own binary in a command.
pub const THIS_BINARY: &str = "ringway";

/// Whether `program` can be run: an existing executable file, or the name of one in `PATH`.
pub fn is_runnable(program: &str) -> bool {
    use std::os::unix::fs::PermissionsExt as _;

    let is_executable =
        |path: &Path| path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0);
    if program == THIS_BINARY {
        return true;
    }
    if program.contains('/') {
        return is_executable(Path::new(program));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| is_executable(&folder.join(program)))
}

impl Processes {
    /// Starts a shim, which starts the replica. Returns the replica's process id, and where it listens.
    pub(super) async fn spawn(&self, name: &str, place: Place) -> io::Result<(u32, Held, Address)> {
        let address = if self.settings.spec.uses_sockets() {
            sockets::create()?
        } else {
            self.ports.address(place).ok_or_else(|| io::Error::other("no free port"))?.into()
        };
        match self.spawn_at(name, &address).await {
            Ok((pid, held)) => Ok((pid, held, address)),
            Err(error) => {
                sockets::remove(&address);
                Err(error)
            }
        }
    }

    async fn spawn_at(&self, name: &str, address: &Address) -> io::Result<(u32, Held)> {
        let (lifeline, of_shim) = UnixStream::pair()?;
        let (output, of_replica) = std::io::pipe()?;
        let mut command = self.command(name, address);
        let shim = command.stdin(OwnedFd::from(of_shim)).stdout(of_replica.try_clone()?).stderr(of_replica).spawn();
        // The command holds copies of the shim's ends; dropping it closes them.
        drop(command);
        let mut shim = shim?;
        tokio::spawn(async move { drop(shim.wait().await) });
        let held = Held { lifeline, output };
        let pid = first_word(&held.lifeline).await?;
        Ok((pid, held))
    }

    fn command(&self, name: &str, address: &Address) -> Command {
        let (placeholder, place) = match address {
            Address::Ip(address) => (PORT, address.port().to_string()),
            Address::Unix(path) => (SOCKET, path.display().to_string()),
        };
        let fill = |text: &str| text.replace(placeholder, &place).replace(SLOT, name);
        let launcher = launcher(&self.settings.launcher);
        let mut words = self.settings.spec.command.iter().map(|word| fill(word));
        let mut command = Command::new(launcher);
        command.arg("shim");
        if let Some(open_files) = self.settings.open_files {
            command.args(["--open-files", &open_files.to_string()]);
        }
        if let Some(directory) = sockets::directory(address) {
            command.arg("--remove").arg(directory);
        }
        command.arg("--");
        match words.next() {
            Some(program) if program == THIS_BINARY => command.arg(launcher),
            Some(program) => command.arg(program),
            None => &mut command,
        };
        command
            .args(words)
            .envs(self.settings.spec.env.iter().map(|(name, value)| (name, fill(value))))
            // Ctrl-C signals a terminal's whole process group; replicas must keep running while Ringway drains.
            .process_group(0);
        for name in PRIVATE_VARIABLES {
            command.env_remove(name);
        }
        command
    }
}

/// The path of the launcher. The binary may have been replaced on disk since the start; `/proc/self/exe` still runs it.
fn launcher(path: &Path) -> &Path {
    if path.exists() { path } else { Path::new("/proc/self/exe") }
}
