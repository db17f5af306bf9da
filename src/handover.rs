//! Letters between an old Ringway and the one that takes over from it: a text and file descriptors each, over a Unix socket
//! that keeps them apart (`SOCK_SEQPACKET`).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::cmsg_space;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// Descriptors in one letter; the kernel takes 253.
pub const MOST_DESCRIPTORS: usize = 200;

/// Longest text of a letter, in bytes: what a socket's buffer holds by default.
const LONGEST: usize = 128 * 1024;

/// One end of the line.
#[derive(Debug)]
pub struct Line(OwnedFd);

/// A text and descriptors.
#[derive(Debug)]
pub struct Letter {
    /// The text.
    pub text: String,
    /// The descriptors, as the sender had them, under numbers of the receiver's own.
    pub descriptors: Vec<OwnedFd>,
}

impl Line {
    /// Both ends.
    ///
    /// # Errors
    /// The system's.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self(one), Self(other)))
    }

    /// The end that this process has got as its standard input.
    ///
    /// # Errors
    /// When there is none.
    pub fn from_stdin() -> io::Result<Self> {
        Ok(Self(io::stdin().as_fd().try_clone_to_owned()?))
    }

    /// For the standard input of a child.
    pub fn into_descriptor(self) -> OwnedFd {
        self.0
    }

    /// How long to wait for a letter, or for room for one; zero: as long as it takes.
    ///
    /// # Errors
    /// The system's.
    pub fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        let timeout = Some(timeout).filter(|timeout| !timeout.is_zero());
        set_socket_timeout(&self.0, Timeout::Recv, timeout)?;
        Ok(set_socket_timeout(&self.0, Timeout::Send, timeout)?)
    }

    /// Sends a letter.
    ///
    /// # Errors
    /// When it is too long, or nobody is there any more.
    pub fn send(&self, text: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        if text.len() > LONGEST || descriptors.len() > MOST_DESCRIPTORS {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a letter that is too long"));
        }
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        sendmsg(&self.0, &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Waits for a letter; `None` when nobody is there any more who could send one.
    ///
    /// # Errors
    /// When none comes in time, or one that is none.
    pub fn receive(&self) -> io::Result<Option<Letter>> {
        let mut bytes = vec![0; LONGEST];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            match recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other?,
            }
        };
        let descriptors = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
            _ => Vec::new(),
        });
        let descriptors: Vec<_> = descriptors.collect();
        if received.bytes == 0 {
            return Ok(None);
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a letter that did not come in as a whole"));
        }
        bytes.truncate(received.bytes);
        let text = String::from_utf8(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        Ok(Some(Letter { text, descriptors }))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    #[test]
    fn letters_come_in_order_and_with_what_was_in_them() {
        let (old, new) = Line::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        old.send("first", &[writer.as_fd(), writer.as_fd()]).unwrap();
        old.send(&"long ".repeat(20_000), &[]).unwrap();
        drop((old, writer));
        let letter = new.receive().unwrap().unwrap();
        assert_eq!((letter.text.as_str(), letter.descriptors.len()), ("first", 2));
        for descriptor in letter.descriptors {
            io::PipeWriter::from(descriptor).write_all(b"x").unwrap();
        }
        let mut got = String::new();
        reader.read_to_string(&mut got).unwrap();
        assert_eq!(got, "xx");
        assert_eq!(new.receive().unwrap().unwrap().text.len(), 100_000);
        assert!(new.receive().unwrap().is_none());
    }

    #[test]
    fn what_does_not_fit_is_refused_and_waiting_has_an_end() {
        let (old, new) = Line::pair().unwrap();
        assert!(old.send(&"x".repeat(LONGEST + 1), &[]).is_err());
        new.set_timeout(Duration::from_millis(10)).unwrap();
        assert!(new.receive().is_err());
        drop(new);
        assert!(old.send("anybody?", &[]).is_err());
    }
}
