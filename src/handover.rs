//! Messages from an old Ringway process to its successor. Each message carries a text and file descriptors, over a Unix
//! socket that preserves message boundaries (`SOCK_SEQPACKET`).

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

/// Maximum number of descriptors in one message. The kernel limit is 253.
pub const MOST_DESCRIPTORS: usize = 200;

/// Maximum length of a packet in bytes. A socket buffer of the default size holds this much.
const LONGEST: usize = 128 * 1024;

/// The first byte of a packet that is a part of a message, with more to come.
const MORE: u8 = 1;

/// The first byte of the last packet of a message with several. A message with one packet has no such byte: no text
/// begins with either of them.
const LAST: u8 = 2;

/// One end of the channel between an old process and its successor.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// A received message.
#[derive(Debug)]
pub struct Message {
    /// Text of the message.
    pub text: String,
    /// Descriptors in the order in which the sender passed them. Their numbers are new in this process.
    pub descriptors: Vec<OwnedFd>,
}

/// A part of a message.
struct Packet {
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    /// Nothing of it is missing: this process had room for all of its descriptors.
    is_whole: bool,
}

impl Channel {
    /// Creates a channel and returns both of its ends.
    ///
    /// # Errors
    /// Returns the error of the system call.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self(one), Self(other)))
    }

    /// Returns the end that the old process passed as the standard input of this process.
    ///
    /// # Errors
    /// Returns an error if the standard input cannot be duplicated.
    pub fn from_stdin() -> io::Result<Self> {
        Ok(Self(io::stdin().as_fd().try_clone_to_owned()?))
    }

    /// Returns the descriptor, to use as the standard input of a child process.
    pub fn into_descriptor(self) -> OwnedFd {
        self.0
    }

    /// Sets the timeout for receiving and for sending a message. Zero waits without a limit.
    ///
    /// # Errors
    /// Returns the error of the system call.
    pub fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        let timeout = Some(timeout).filter(|timeout| !timeout.is_zero());
        set_socket_timeout(&self.0, Timeout::Recv, timeout)?;
        Ok(set_socket_timeout(&self.0, Timeout::Send, timeout)?)
    }

    /// Sends a message, in several packets if it is long. The first one carries the descriptors.
    ///
    /// # Errors
    /// Returns an error if there are too many descriptors or the other end is closed.
    pub fn send(&self, text: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        if descriptors.len() > MOST_DESCRIPTORS {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the handover message has too many descriptors"));
        }
        if text.len() <= LONGEST {
            return self.send_packet(text.as_bytes(), descriptors);
        }
        let parts = text.len().div_ceil(LONGEST - 1);
        for (n, part) in text.as_bytes().chunks(LONGEST - 1).enumerate() {
            let begin = if n + 1 < parts { MORE } else { LAST };
            let packet: Vec<u8> = std::iter::once(begin).chain(part.iter().copied()).collect();
            self.send_packet(&packet, if n == 0 { descriptors } else { &[] })?;
        }
        Ok(())
    }

    fn send_packet(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Waits for the answer of the other end to a message. If the other end has closed without reading the message, its last answer
    /// counts.
    ///
    /// # Errors
    /// As [`Channel::receive`].
    pub fn answer(&self) -> io::Result<Option<Message>> {
        match self.receive() {
            // The first read reports the unread message, and the next one the answer.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => self.receive(),
            other => other,
        }
    }

    /// Waits for a message. Returns `None` if the other end is closed.
    ///
    /// # Errors
    /// Returns an error if the timeout expires or if the message is truncated or not UTF-8.
    pub fn receive(&self) -> io::Result<Option<Message>> {
        let (mut text, mut descriptors, mut is_whole) = (Vec::new(), Vec::new(), true);
        loop {
            let Some(Packet { bytes: packet, descriptors: more, is_whole: all }) = self.receive_packet()? else {
                return Ok(None);
            };
            descriptors.extend(more);
            // The next packets belong to this message in any case.
            is_whole &= all;
            match packet.first() {
                Some(&MORE) => text.extend_from_slice(&packet[1..]),
                Some(&LAST) => {
                    text.extend_from_slice(&packet[1..]);
                    break;
                }
                _ => {
                    text = packet;
                    break;
                }
            }
        }
        if !is_whole {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the handover message is truncated"));
        }
        let text = String::from_utf8(text).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        Ok(Some(Message { text, descriptors }))
    }

    /// The next packet.
    fn receive_packet(&self) -> io::Result<Option<Packet>> {
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
        bytes.truncate(received.bytes);
        let is_whole = !received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
        Ok(Some(Packet { bytes, descriptors, is_whole }))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    #[test]
    fn messages_arrive_in_order_with_text_and_descriptors() {
        let (old, new) = Channel::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        old.send("first", &[writer.as_fd(), writer.as_fd()]).unwrap();
        old.send(&"long ".repeat(20_000), &[]).unwrap();
        drop((old, writer));
        let message = new.receive().unwrap().unwrap();
        assert_eq!((message.text.as_str(), message.descriptors.len()), ("first", 2));
        for descriptor in message.descriptors {
            io::PipeWriter::from(descriptor).write_all(b"x").unwrap();
        }
        let mut got = String::new();
        reader.read_to_string(&mut got).unwrap();
        assert_eq!(got, "xx");
        assert_eq!(new.receive().unwrap().unwrap().text.len(), 100_000);
        assert!(new.receive().unwrap().is_none());
    }

    #[test]
    fn a_long_message_arrives_whole_with_its_descriptors() {
        let (old, new) = Channel::pair().unwrap();
        let text: String =
            (0..100_000_u32).map(|n| char::from(b'a' + (n % 26) as u8)).chain("é".repeat(200_000).chars()).collect();
        let (_reader, writer) = io::pipe().unwrap();
        let sent = text.clone();
        let sender = std::thread::spawn(move || {
            old.send(&sent, &[writer.as_fd()]).unwrap();
            old.send("next", &[]).unwrap();
        });
        let message = new.receive().unwrap().unwrap();
        assert!(message.text == text && message.descriptors.len() == 1);
        assert_eq!(new.receive().unwrap().unwrap().text, "next");
        sender.join().unwrap();
    }

    #[test]
    fn a_receive_times_out_and_a_send_to_nobody_fails() {
        let (old, new) = Channel::pair().unwrap();
        new.set_timeout(Duration::from_millis(10)).unwrap();
        assert!(new.receive().is_err());
        drop(new);
        assert!(old.send("anybody?", &[]).is_err());
    }
}
