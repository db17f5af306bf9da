//! `ringway healthcheck`: the `HEALTHCHECK` of Ringway's image. Asks process 1, which is Ringway in one of its roles,
//! whether it serves.

use anyhow::Context as _;
use clap::Parser as _;
use echo_server::Listen;

use super::{Arguments, Command, Failure, runtime, side_port};

/// `is_live`: Ringway need not be ready.
pub(crate) fn healthcheck(is_live: bool) -> Result<(), Failure> {
    let line = std::fs::read("/proc/1/cmdline").context("cannot read /proc/1/cmdline")?;
    let line = String::from_utf8_lossy(&line);
    let words: Vec<&str> = line.trim_end_matches('\0').split('\0').collect();
    let arguments = role(&words).with_context(|| {
        let program = words.first().unwrap_or(&"another program");
        format!("process 1 is not Ringway but {program}: healthcheck is for Ringway's containers")
    })?;
    let (address, path) = match arguments.command {
        None | Some(Command::Run) => {
            (arguments.common.source().api()?.listen, if is_live { "/healthz" } else { "/readyz" })
        }
        Some(Command::EchoServer(options)) => match options.listen {
            Listen::Ip(listen) => (listen, "/heartbeat"),
            Listen::Unix(path) => {
                let accepts = std::os::unix::net::UnixStream::connect(&path);
                return Ok(accepts.map(drop).with_context(|| format!("cannot connect to unix:{}", path.display()))?);
            }
        },
        // The other commands have no server to ask: a running process is healthy.
        Some(_) => return Ok(()),
    };
    let answer = runtime()?.block_on(side_port::get(&address.to_string(), path));
    let answer = answer.with_context(|| format!("http://{address}{path}"))?;
    if answer.status().is_success() {
        return Ok(());
    }
    let body = String::from_utf8_lossy(answer.body());
    Err(anyhow::anyhow!("http://{address}{path}: {} {}", answer.status(), body.trim_end()).into())
}

/// The arguments of process 1. The engine may run it under an init: `docker-init -- ringway …`.
fn role(words: &[&str]) -> Option<Arguments> {
    let own = words.iter().position(|&word| word == "--").map_or(words, |end| &words[end + 1..]);
    let is_ringway = own.first()?.rsplit('/').next() == Some("ringway");
    is_ringway.then(|| Arguments::try_parse_from(own).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_role_is_read_from_the_command_line_of_process_1() {
        assert!(matches!(role(&["/ringway", "--config", "/c.yaml"]), Some(Arguments { command: None, .. })));
        let echo = ["/sbin/docker-init", "--", "/ringway", "echo-server", "--listen", "0.0.0.0:9000"];
        let Some(Arguments { command: Some(Command::EchoServer(options)), .. }) = role(&echo) else { panic!() };
        assert_eq!(options.listen.to_string(), "0.0.0.0:9000");
        assert!(role(&["/bin/sh", "-c", "true"]).is_none());
        assert!(role(&[""]).is_none());
    }
}
