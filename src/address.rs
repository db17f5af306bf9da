//! Where something listens: an IP address with a port, or the path of a Unix socket.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Begins the text of a Unix socket's address.
const UNIX: &str = "unix:";

/// Longest path of a Unix socket in bytes: the kernel's field has 108, and the last one is zero (unix(7)).
const LONGEST_PATH: usize = 107;

/// Where a backend or a listener listens. Its text is `10.0.0.5:80`, `[::1]:80` or `unix:/path`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    /// TCP over IPv4 or IPv6.
    Ip(SocketAddr),
    /// The path of a Unix stream socket.
    Unix(Arc<Path>),
}

impl Address {
    /// Converts a path. It is absolute and short enough for the kernel.
    ///
    /// # Errors
    /// What is wrong with the path, and the remedy.
    pub fn of_path(path: &str) -> Result<Self, String> {
        let problem = if !path.starts_with('/') {
            "is not an absolute path: begin it with /".to_owned()
        } else if path.len() > LONGEST_PATH {
            format!("is {} bytes long, but the kernel allows at most {LONGEST_PATH}: choose a shorter path", path.len())
        } else if path.ends_with('/') {
            "ends with /: write the path of a file, like /run/web.sock".to_owned()
        } else if !path.chars().all(|c| !c.is_control() && !c.is_whitespace()) {
            "contains a space or a control character: remove it".to_owned()
        } else {
            return Ok(Self::Unix(Path::new(path).into()));
        };
        Err(format!("{path:?} {problem}"))
    }

    /// Parses the text of a Unix socket's address; `None`: it does not begin with `unix:`.
    pub fn parse_unix(text: &str) -> Option<Result<Self, String>> {
        text.strip_prefix(UNIX).map(Self::of_path)
    }

    /// The IP address and port; `None` for a Unix socket.
    pub fn ip(&self) -> Option<SocketAddr> {
        if let Self::Ip(address) = self { Some(*address) } else { None }
    }

    /// The address with this port; `None`: with its own. A Unix socket has none.
    #[must_use]
    pub fn at_port(&self, port: Option<u16>) -> Self {
        let mut other = self.clone();
        if let (Self::Ip(ip), Some(port)) = (&mut other, port) {
            ip.set_port(port);
        }
        other
    }

    /// The text of this address and of the next ones, for this number of ports: `0.0.0.0:5000-5149`.
    pub fn with_ports(&self, ports: u16) -> String {
        let last = self.ip().map(|ip| ip.port().saturating_add(ports.saturating_sub(1))).filter(|_| ports > 1);
        last.map_or_else(|| self.to_string(), |last| format!("{self}-{last}"))
    }

    /// Whether the system chooses the port.
    pub fn is_any_port(&self) -> bool {
        self.ip().is_some_and(|address| address.port() == 0)
    }
}

/// Parses the IP address and the ports of a listener: `0.0.0.0:8000`, or a range like `0.0.0.0:5000-5149`. Returns the first
/// address, and the number of ports.
///
/// # Errors
/// What is wrong with the text, and the remedy.
pub fn listen_ports(text: &str, most: u16) -> Result<(SocketAddr, u16), String> {
    let range = text.rsplit_once(':').and_then(|(host, ports)| Some((host, ports.split_once('-')?)));
    let Some((host, (first, last))) = range.filter(|(_, (first, _))| first.bytes().all(|byte| byte.is_ascii_digit()))
    else {
        return Ok((listen_ip(text)?, 1));
    };
    let address = listen_ip(&format!("{host}:{first}"))?;
    let last: u16 = last.parse().ok().filter(|_| last.bytes().all(|byte| byte.is_ascii_digit())).ok_or_else(|| {
        format!(
            "{text:?} has {last:?} in place of the last port: write a range like {}",
            Address::Ip(address).with_ports(150)
        )
    })?;
    match last.checked_sub(address.port()) {
        _ if address.port() == 0 => Err(format!("{text:?} begins with port 0: write a range like {host}:5000-5149")),
        None => Err(format!("{text:?} ends before it begins: write {host}:{last}-{first}")),
        Some(more) if more >= most => Err(format!(
            "{text:?} has {} ports, and a listener has at most {most}: divide them among several listeners",
            u32::from(more) + 1
        )),
        Some(more) => Ok((address, more + 1)),
    }
}

/// Parses the IP address and the port of a listener. Port 0 lets the system choose a port.
///
/// # Errors
/// What is wrong with the text, and the remedy.
pub fn listen_ip(text: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return match address.ip().to_canonical() {
            ip if ip == address.ip() => Ok(address),
            ip => {
                Err(format!("{text:?} is an IPv4 address in IPv6 form: write {}", SocketAddr::new(ip, address.port())))
            }
        };
    }
    let (host, port) = host_and_port(text).map_err(|problem| format!("{text:?} {problem}"))?;
    Err(match host {
        "" | "*" => format!(
            "{text:?} has no address: write 0.0.0.0:{port} for all IPv4 addresses, or [::]:{port} for all IPv6 addresses"
        ),
        "localhost" => {
            format!("{text:?} is a name, and a listener needs an IP address: write 127.0.0.1:{port} or [::1]:{port}")
        }
        _ => format!("{text:?} is a name, and a listener needs an IP address of this machine, like 0.0.0.0:{port}"),
    })
}

/// Splits `host:port`. The host is an IPv4 address, an IPv6 address without its brackets, a name, `*` or empty.
///
/// # Errors
/// What is wrong with the text, and the remedy, without the text itself.
pub fn host_and_port(text: &str) -> Result<(&str, u16), String> {
    if let Some((scheme, rest)) = text.split_once("://") {
        return Err(format!("is a URL: write {} without {scheme}://", rest.trim_end_matches('/')));
    }
    if let Some((ip, port)) = text.rsplit_once(':')
        && ip.parse::<Ipv6Addr>().is_ok()
        && port.parse::<u16>().is_ok()
    {
        return Err(format!("lacks the brackets of an IPv6 address: write [{ip}]:{port}, or [{text}]:8000"));
    }
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Err(format!("has no port: write it like {}", SocketAddr::new(ip, 8000)));
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        let is_port = text.parse::<u16>().is_ok();
        return Err(if is_port {
            format!("has no address: write it like 127.0.0.1:{text}")
        } else {
            format!("has no port: write it like {text}:8000")
        });
    };
    if host.contains(':') && host.chars().all(|c| c.is_ascii_hexdigit() || c == ':') {
        return Err(format!("lacks the brackets of an IPv6 address: write it like [{host}]:{port}"));
    }
    let is_number = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let port: u16 = match port.parse() {
        Ok(port) if is_number => port,
        _ if is_number => return Err(format!("has the port {port}, and the highest is 65535: write another port")),
        _ => return Err(format!("has {port:?} in place of a port: write a number from 1 to 65535")),
    };
    if let Some(rest) = host.strip_prefix('[') {
        let ip = rest.strip_suffix(']').and_then(|ip| Some((ip, ip.parse::<Ipv6Addr>().ok()?)));
        let (ip, address) =
            ip.ok_or_else(|| format!("has no IPv6 address in its brackets: write it like [::1]:{port}"))?;
        return match address.to_ipv4_mapped() {
            Some(mapped) => Err(format!("is an IPv4 address in IPv6 form: write {mapped}:{port}")),
            None => Ok((ip, port)),
        };
    }
    if let Some(problem) = numeric_fault(host, port) {
        return Err(problem);
    }
    if host.contains([']', ':', '/', '@', ','].as_slice()) || host.contains(char::is_whitespace) {
        return Err(format!("has {host:?} in place of a host: write it like 10.0.0.5:{port} or db.local:{port}"));
    }
    Ok((host, port))
}

/// What is wrong with a host that a resolver reads as a number (`inet_aton(3)`): `010.0.0.1` is 8.0.0.1 to it, and `10.1` is
/// 10.0.0.1.
fn numeric_fault(host: &str, port: u16) -> Option<String> {
    let parts: Vec<_> = host.split('.').collect();
    let is_number = |part: &&str| {
        let digits = part.strip_prefix("0x").or_else(|| part.strip_prefix("0X"));
        digits.map_or(!part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()), |digits| {
            digits.bytes().all(|byte| byte.is_ascii_hexdigit())
        })
    };
    if host.parse::<Ipv4Addr>().is_ok() || !parts.iter().all(is_number) {
        return None;
    }
    let decimal: Option<Vec<u8>> = parts.iter().map(|part| part.parse().ok()).collect();
    Some(match decimal.as_deref() {
        Some(&[a, b, c, d]) => {
            format!(
                "has zeros at the beginning of a number, which a resolver takes for octal: write {a}.{b}.{c}.{d}:{port}"
            )
        }
        _ => "is not an IPv4 address: write four numbers from 0 to 255, like 10.0.0.5".to_owned() + &format!(":{port}"),
    })
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "{UNIX}{}", path.display()),
        }
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse_unix(text).unwrap_or_else(|| {
            let address = text.parse().map(Self::Ip);
            address.map_err(|_| format!("{text:?} is neither an IP address with a port nor unix:/path"))
        })
    }
}

impl TryFrom<String> for Address {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Ip(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_survives_a_round_trip_through_its_text() {
        for text in ["10.0.0.5:80", "[::1]:80", "unix:/run/web.sock"] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
            let json = serde_json::to_string(&address).unwrap();
            assert_eq!(serde_json::from_str::<Address>(&json).unwrap(), address);
        }
        assert!("unix:/run/web.sock".parse::<Address>().unwrap().ip().is_none());
    }

    #[test]
    fn a_wrong_address_has_a_remedy() {
        for (text, part) in [
            ("0.0.0.0:70000", "the highest is 65535"),
            ("*:80", "write 0.0.0.0:80"),
            (":80", "write 0.0.0.0:80"),
            ("localhost:80", "write 127.0.0.1:80 or [::1]:80"),
            ("web.example:80", "needs an IP address of this machine"),
            ("8000", "write it like 127.0.0.1:8000"),
            ("10.0.0.5", "has no port: write it like 10.0.0.5:8000"),
            ("::1", "write it like [::1]:8000"),
            ("::1:80", "brackets"),
            ("[::1:80", "brackets"),
            ("10.0.0.5:http", "\"http\" in place of a port"),
            ("10.0.0.5:", "in place of a port"),
            ("10.0.0.5:+80", "in place of a port"),
            ("http://10.0.0.5:80/", "write 10.0.0.5:80 without http://"),
            ("010.0.0.1:80", "octal: write 10.0.0.1:80"),
            ("10.1:80", "four numbers"),
            ("0x7f.1:80", "four numbers"),
            ("256.0.0.1:80", "four numbers"),
            ("2130706433:80", "four numbers"),
            ("[::ffff:127.0.0.1]:80", "write 127.0.0.1:80"),
            ("10.0.0.5:80, 10.0.0.6:80", "in place of a host"),
        ] {
            let problem = listen_ip(text).unwrap_err();
            assert!(problem.contains(part), "{text}: {problem}");
        }
        for text in ["0.0.0.0:80", "[::]:0", "127.0.0.1:65535", "[fe80::1%2]:80"] {
            assert!(listen_ip(text).is_ok(), "{text}");
        }
        for (text, host) in [
            ("db:5432", "db"),
            ("[::1]:80", "::1"),
            ("1e100.net:80", "1e100.net"),
            ("0.pool.ntp.org:1", "0.pool.ntp.org"),
        ] {
            assert_eq!(host_and_port(text).unwrap().0, host);
        }
    }

    #[test]
    fn a_path_that_the_kernel_would_refuse_is_an_error() {
        let error = |text: &str| text.parse::<Address>().unwrap_err();
        assert!(error("unix:web.sock").contains("absolute"));
        assert!(error("unix:").contains("absolute"));
        assert!(error("unix:/run/").contains("the path of a file"));
        assert!(error("unix:/run/a b").contains("contains a space"));
        assert!(error(&format!("unix:/{}", "x".repeat(107))).contains("108 bytes long"));
        assert!(format!("unix:/{}", "x".repeat(106)).parse::<Address>().is_ok());
        assert!(error("localhost:80").contains("unix:/path"));
    }
}
