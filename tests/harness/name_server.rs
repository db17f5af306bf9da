//! A name server whose answers a test decides, over UDP and TCP on one port.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use hickory_resolver::proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_resolver::proto::rr::rdata::{A, AAAA, CNAME, NS, SRV};
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};

/// How the server answers a question.
#[derive(Debug, Clone)]
pub(crate) enum Reply {
    /// With these records of the name in question and this TTL in seconds; none: NOERROR without an answer.
    Records(u32, Vec<RData>),
    /// With a code like SERVFAIL.
    Code(ResponseCode),
    /// Over UDP with a cut-off answer without a record, over TCP with this reply.
    LongerThanUdp(Box<Reply>),
    /// With a cut-off answer, also over TCP.
    CutOff,
    /// With another id than that of the question.
    WrongId,
    /// With a referral to other servers.
    Referral,
    /// Over UDP not at all, over TCP with this reply.
    OnlyTcp(Box<Reply>),
    /// With bytes that are no answer.
    Garbage,
    /// Not at all.
    Silent,
}

type Script = dyn FnMut(&str, RecordType) -> Reply + Send;

/// A name server. It stops when it is dropped.
pub(crate) struct NameServer {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    script: Mutex<Box<Script>>,
    asked: Mutex<BTreeMap<(String, RecordType), usize>>,
    stop: AtomicBool,
}

/// How often the threads look whether they must stop.
const LOOK: Duration = Duration::from_millis(20);

impl NameServer {
    /// Starts at a free port. Names are in lower case and end with a dot.
    pub(crate) fn start(script: impl FnMut(&str, RecordType) -> Reply + Send + 'static) -> Self {
        Self::start_at("127.0.0.1:0", script)
    }

    /// Starts at this address.
    pub(crate) fn start_at(address: &str, script: impl FnMut(&str, RecordType) -> Reply + Send + 'static) -> Self {
        // The free port of one protocol may be taken in the other.
        let (udp, tcp) = (0..100)
            .find_map(|_| {
                let tcp = TcpListener::bind(address).unwrap();
                let udp = UdpSocket::bind(tcp.local_addr().unwrap()).ok()?;
                Some((udp, tcp))
            })
            .expect("a port that is free in both protocols");
        let address = tcp.local_addr().unwrap();
        let shared = Arc::new(Shared {
            script: Mutex::new(Box::new(script)),
            asked: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        udp.set_read_timeout(Some(LOOK)).unwrap();
        tcp.set_nonblocking(true).unwrap();
        let (of_udp, of_tcp) = (Arc::clone(&shared), Arc::clone(&shared));
        let threads = vec![
            std::thread::spawn(move || of_udp.serve_udp(&udp)),
            std::thread::spawn(move || of_tcp.serve_tcp(&tcp)),
        ];
        Self { address, shared, threads }
    }

    /// From now on, this decides.
    pub(crate) fn now(&self, script: impl FnMut(&str, RecordType) -> Reply + Send + 'static) {
        *self.shared.script.lock().unwrap() = Box::new(script);
    }

    /// How often the server was asked this.
    pub(crate) fn asked(&self, name: &str, kind: RecordType) -> usize {
        self.shared.asked.lock().unwrap().get(&(name.to_owned(), kind)).copied().unwrap_or_default()
    }

    /// All names that the server was asked for.
    pub(crate) fn names(&self) -> Vec<String> {
        let asked = self.shared.asked.lock().unwrap();
        let mut names: Vec<_> = asked.keys().map(|(name, _)| name.clone()).collect();
        names.dedup();
        names
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the name server panicked");
        }
    }
}

impl Shared {
    fn serve_udp(&self, socket: &UdpSocket) {
        let mut buffer = [0; 4096];
        while !self.stop.load(Ordering::Relaxed) {
            if let Ok((length, client)) = socket.recv_from(&mut buffer)
                && let Some(answer) = self.answer(&buffer[..length], false)
            {
                let _ = socket.send_to(&answer, client);
            }
        }
    }

    fn serve_tcp(&self, listener: &TcpListener) {
        while !self.stop.load(Ordering::Relaxed) {
            match listener.accept() {
                // One client at a time is enough for a test.
                Ok((stream, _)) => drop(self.serve_client(stream)),
                Err(_) => std::thread::sleep(LOOK),
            }
        }
    }

    fn serve_client(&self, mut stream: TcpStream) -> std::io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(10 * LOOK))?;
        loop {
            let mut length = [0; 2];
            stream.read_exact(&mut length)?;
            let mut question = vec![0; u16::from_be_bytes(length).into()];
            stream.read_exact(&mut question)?;
            if let Some(answer) = self.answer(&question, true) {
                stream.write_all(&u16::try_from(answer.len()).unwrap().to_be_bytes())?;
                stream.write_all(&answer)?;
            }
        }
    }

    fn answer(&self, question: &[u8], is_tcp: bool) -> Option<Vec<u8>> {
        let question = Message::from_vec(question).unwrap();
        let query = question.queries[0].clone();
        let (name, kind) = (query.name().to_ascii().to_lowercase(), query.query_type());
        *self.asked.lock().unwrap().entry((name.clone(), kind)).or_default() += 1;
        let reply = self.script.lock().unwrap()(&name, kind);
        encode(&question, &query, &reply, is_tcp)
    }
}

fn encode(question: &Message, query: &Query, reply: &Reply, is_tcp: bool) -> Option<Vec<u8>> {
    let mut message = Message::new(question.id, MessageType::Response, OpCode::Query);
    message.add_query(query.clone());
    match reply {
        Reply::Records(ttl, records) => {
            // The records after an alias belong to the name that it leads to.
            let mut name = query.name().clone();
            for data in records {
                message.add_answer(Record::from_rdata(name.clone(), *ttl, data.clone()));
                if let RData::CNAME(next) = data {
                    name = next.0.clone();
                }
            }
        }
        Reply::Code(code) => message.metadata.response_code = *code,
        Reply::LongerThanUdp(reply) | Reply::OnlyTcp(reply) if is_tcp => return encode(question, query, reply, is_tcp),
        Reply::Referral => {
            let server = RData::NS(NS(Name::from_ascii("ns.test.").unwrap()));
            message.add_authority(Record::from_rdata(Name::from_ascii("test.").unwrap(), 60, server));
        }
        Reply::LongerThanUdp(_) | Reply::CutOff => message.metadata.truncation = true,
        Reply::WrongId => message.metadata.id = question.id.wrapping_add(1),
        Reply::Garbage => return Some([&question.id.to_be_bytes()[..], b"no answer"].concat()),
        Reply::OnlyTcp(_) | Reply::Silent => return None,
    }
    Some(message.to_vec().unwrap())
}

/// An A record.
pub(crate) fn a(address: &str) -> RData {
    RData::A(A(address.parse::<Ipv4Addr>().unwrap()))
}

/// An AAAA record.
pub(crate) fn aaaa(address: &str) -> RData {
    RData::AAAA(AAAA(address.parse::<Ipv6Addr>().unwrap()))
}

/// A CNAME record.
pub(crate) fn cname(name: &str) -> RData {
    RData::CNAME(CNAME(Name::from_ascii(name).unwrap()))
}

/// An SRV record.
pub(crate) fn srv(priority: u16, weight: u16, port: u16, target: &str) -> RData {
    RData::SRV(SRV::new(priority, weight, port, Name::from_ascii(target).unwrap()))
}

/// The reply for the type of these records, and an answer without a record for other types.
pub(crate) fn only(kind: RecordType, asked: RecordType, ttl: u32, records: Vec<RData>) -> Reply {
    Reply::Records(ttl, if kind == asked { records } else { Vec::new() })
}
