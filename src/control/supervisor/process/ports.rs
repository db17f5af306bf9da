//! The ports of replicas that are child processes.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use socket2::{Domain, Socket, Type};

use super::Handed;
use crate::control::provider::slot_number;

/// Ports reserved for slots. Ringway binds each with `SO_REUSEADDR` but does not listen: the replica can bind it too,
/// and the system does not assign it to any other program as an ephemeral port. A slot keeps its port for good.
#[derive(Debug)]
pub struct Ports {
    range: Option<(u16, u16)>,
    reserved: Vec<(SocketAddr, Socket)>,
}

impl Ports {
    /// Reserves ports for this many slots. Replicas that are taken over keep theirs.
    ///
    /// # Errors
    /// When the range does not have enough free ports.
    pub fn reserve(pool: &str, range: Option<(u16, u16)>, slots: usize, handed: &[Handed]) -> io::Result<Self> {
        let mut ports = Self { range, reserved: Vec::new() };
        let with_port = handed
            .iter()
            .filter_map(|one| Some((slot_number(pool, &one.slot)? as usize, one.address.ip()?, one.port.as_ref()?)));
        let handed: BTreeMap<usize, _> = with_port.map(|(n, address, port)| (n, (address, port))).collect();
        let highest = handed.keys().max().copied().unwrap_or_default();
        for n in 1..=slots.max(highest) {
            match handed.get(&n) {
                Some(&(address, port)) => ports.reserved.push((address, port.try_clone()?)),
                None => ports.extend(n)?,
            }
        }
        Ok(ports)
    }

    /// Reserves ports for slots without one.
    pub(super) fn extend(&mut self, slots: usize) -> io::Result<()> {
        let mut candidates: Box<dyn Iterator<Item = u16>> = match self.range {
            Some((first, last)) => Box::new(first..=last),
            None => Box::new(std::iter::repeat(0)),
        };
        while self.reserved.len() < slots {
            let port = candidates.next().ok_or(io::ErrorKind::AddrInUse)?;
            // Two of our own sockets could bind the same port as long as neither listens.
            if port != 0 && self.reserved.iter().any(|(address, _)| address.port() == port) {
                continue;
            }
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            match socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into()) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && port != 0 => continue,
                Err(error) => return Err(error),
            }
            let address = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
            self.reserved.push((address, socket));
        }
        Ok(())
    }

    pub(super) fn address(&self, slot: usize) -> Option<SocketAddr> {
        self.reserved.get(slot).map(|(address, _)| *address)
    }

    /// The socket that reserves the port of a slot.
    pub(super) fn socket(&self, slot: usize) -> Option<&Socket> {
        self.reserved.get(slot).map(|(_, socket)| socket)
    }
}
