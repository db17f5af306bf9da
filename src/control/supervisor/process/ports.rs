//! The ports of replicas that are child processes.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use socket2::{Domain, Socket, Type};

use super::Handed;
use crate::control::provider::slot_number;
use crate::control::supervisor::plan::Place;

/// Ports reserved for seats. Ringway binds each with `SO_REUSEADDR` but does not listen: the replica can bind it too,
/// and the system does not assign it to any other program as an ephemeral port. A slot keeps its port until
/// a flip exchanges it for the one beside it. That is free again when the old replica has ended.
#[derive(Debug)]
pub struct Ports {
    range: Option<(u16, u16)>,
    reserved: BTreeMap<Place, (SocketAddr, Socket)>,
}

impl Ports {
    /// Reserves ports for this many slots. Replicas that are taken over keep theirs.
    ///
    /// # Errors
    /// When the range does not have enough free ports.
    pub fn reserve(pool: &str, range: Option<(u16, u16)>, slots: usize, handed: &[Handed]) -> io::Result<Self> {
        let mut ports = Self { range, reserved: BTreeMap::new() };
        for one in handed {
            let number = slot_number(pool, &one.slot);
            if let (Some(number), Some(address), Some(port)) = (number, one.address.ip(), &one.port) {
                ports.reserved.insert(one.place(number), (address, port.try_clone()?));
            }
        }
        let highest = ports.reserved.keys().map(|place| place.slot + 1).max();
        ports.extend(slots.max(highest.unwrap_or_default()))?;
        Ok(ports)
    }

    /// Reserves ports for slots without one.
    pub(super) fn extend(&mut self, slots: usize) -> io::Result<()> {
        (0..slots).try_for_each(|slot| self.add(Place::front(slot)))
    }

    /// Reserves a port for a replica beside the one that fills the slot.
    pub(super) fn reserve_beside(&mut self, slot: usize) -> io::Result<()> {
        self.add(Place::beside(slot))
    }

    /// Exchanges the ports of the two replicas of a slot.
    pub(super) fn flip(&mut self, slot: usize) {
        let (front, beside) = (Place::front(slot), Place::beside(slot));
        let placed = [(beside, self.reserved.remove(&front)), (front, self.reserved.remove(&beside))];
        self.reserved.extend(placed.into_iter().filter_map(|(place, port)| Some((place, port?))));
    }

    /// Frees the port of a replica beside a slot.
    pub(super) fn release_beside(&mut self, slot: usize) {
        self.reserved.remove(&Place::beside(slot));
    }

    fn add(&mut self, place: Place) -> io::Result<()> {
        if self.reserved.contains_key(&place) {
            return Ok(());
        }
        let candidates: Box<dyn Iterator<Item = u16>> = match self.range {
            Some((first, last)) => Box::new(first..=last),
            None => Box::new(std::iter::once(0)),
        };
        for port in candidates {
            // Two of our own sockets could bind the same port as long as neither listens.
            if port != 0 && self.reserved.values().any(|(address, _)| address.port() == port) {
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
            self.reserved.insert(place, (address, socket));
            return Ok(());
        }
        Err(io::ErrorKind::AddrInUse.into())
    }

    pub(super) fn address(&self, place: Place) -> Option<SocketAddr> {
        self.reserved.get(&place).map(|(address, _)| *address)
    }

    /// The socket that reserves a port.
    pub(super) fn socket(&self, place: Place) -> Option<&Socket> {
        self.reserved.get(&place).map(|(_, socket)| socket)
    }
}
