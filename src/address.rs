//! Where something listens: an IP address with a port, or the path of a Unix socket.

use std::fmt;
use std::net::SocketAddr;
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

    /// Whether the system chooses the port.
    pub fn is_any_port(&self) -> bool {
        self.ip().is_some_and(|address| address.port() == 0)
    }
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
