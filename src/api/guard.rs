//! Decides which calls may change something through the side port.
//!
//! A web page that is open in a browser on this machine can send requests to 127.0.0.1. The guard therefore rejects
//! changing calls that name a foreign host (DNS rebinding) or come from another site, even with a valid token.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Request, State as Extract};
use axum::http::header::{AUTHORIZATION, HOST, HeaderName, ORIGIN, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::State;
use super::error::Error;

/// The rules for calls that change something.
#[derive(Clone)]
pub struct Guard {
    token: Option<Arc<str>>,
    allowed_hosts: Vec<String>,
    is_loopback: bool,
}

impl std::fmt::Debug for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The token is never printed.
        f.debug_struct("Guard").field("has_token", &self.token.is_some()).finish_non_exhaustive()
    }
}

impl Guard {
    /// Creates the rules for a side port that listens on `address`. Without a token, only a side port on loopback
    /// accepts changes.
    pub fn new(address: SocketAddr, token: Option<&str>, allowed_hosts: Vec<String>) -> Self {
        Self { token: token.map(Into::into), allowed_hosts, is_loopback: address.ip().to_canonical().is_loopback() }
    }

    /// Whether this side port rejects every change.
    pub fn is_read_only(&self) -> bool {
        self.token.is_none() && !self.is_loopback
    }

    fn check(&self, headers: &HeaderMap) -> Result<(), Error> {
        let text = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
        let host = text(HOST).unwrap_or_default();
        if !self.is_ours(host) {
            let message = format!(
                "the host {host:?} is not allowed: call the side port by its IP address or as localhost, or add the name to api.allowed_hosts"
            );
            return Err(Error::new(StatusCode::MISDIRECTED_REQUEST, "foreign_host", message));
        }
        let is_own_origin = |origin: &str| origin.split_once("://").is_some_and(|(_, from)| from == host);
        let is_cross_site = text(ORIGIN).is_some_and(|origin| !is_own_origin(origin))
            || text(HeaderName::from_static("sec-fetch-site"))
                .is_some_and(|site| site.ends_with("-site") && site != "same-site");
        if is_cross_site {
            let message =
                "the request comes from a web page of another site: pages of other sites may not change anything";
            return Err(Error::new(StatusCode::FORBIDDEN, "cross_site", message));
        }
        let Some(token) = &self.token else {
            if self.is_loopback {
                return Ok(());
            }
            let message = "this side port is read-only: it has no token and is not on loopback; set api.token_file or \
                           RINGWAY_TOKEN and restart";
            return Err(Error::new(StatusCode::FORBIDDEN, "read_only", message));
        };
        let given = text(AUTHORIZATION).and_then(|value| {
            let (scheme, given) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| given.trim())
        });
        if given.is_some_and(|given| is_equal(given.as_bytes(), token.as_bytes())) {
            return Ok(());
        }
        let message = "this call requires the token of the side port: send the header `authorization: Bearer TOKEN`";
        Err(Error::new(StatusCode::UNAUTHORIZED, "unauthorized", message))
    }

    /// Whether a `host` header names this side port. Any IP address is safe, because DNS rebinding needs a name.
    fn is_ours(&self, host: &str) -> bool {
        if host.parse::<SocketAddr>().is_ok() {
            return true;
        }
        let name = match host.rsplit_once(':') {
            Some((name, port)) if port.parse::<u16>().is_ok() => name,
            _ => host,
        };
        let is_address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().is_ok();
        let is_allowed = |allowed: &String| allowed.eq_ignore_ascii_case(name);
        is_address || name.eq_ignore_ascii_case("localhost") || self.allowed_hosts.iter().any(is_allowed)
    }
}

/// Compares in constant time, so the duration does not reveal where the values differ.
fn is_equal(one: &[u8], other: &[u8]) -> bool {
    one.len() == other.len() && std::iter::zip(one, other).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
}

/// Middleware for calls that can change something: passes an allowed call on, or responds with an error.
pub(super) async fn guard(Extract(state): Extract<Arc<State>>, request: Request, next: Next) -> Response {
    match state.guard.check(request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => {
            let mut response = error.into_response();
            if response.status() == StatusCode::UNAUTHORIZED {
                response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            response
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(guard: &Guard, headers: &[(&'static str, &str)]) -> Option<&'static str> {
        let mut map = HeaderMap::new();
        for &(name, value) in headers {
            map.insert(name, value.parse().unwrap());
        }
        guard.check(&map).err().map(|error| error.code())
    }

    fn guard(address: &str, token: Option<&str>) -> Guard {
        Guard::new(address.parse().unwrap(), token, vec!["balancer".to_owned()])
    }

    #[test]
    fn only_ip_addresses_localhost_and_allowed_names_are_accepted_as_host() {
        let guard = guard("127.0.0.1:8001", None);
        for host in
            ["127.0.0.1:8001", "localhost:8001", "[::1]:8001", "[::1]", "10.0.0.1", "LOCALHOST", "balancer:8001"]
        {
            assert_eq!(code(&guard, &[("host", host)]), None, "{host}");
        }
        for host in ["evil.example", "localhost.evil.example:8001", "", "balancer.evil"] {
            assert_eq!(code(&guard, &[("host", host)]), Some("foreign_host"), "{host}");
        }
        assert_eq!(code(&guard, &[]), Some("foreign_host"));
    }

    #[test]
    fn requests_from_pages_of_other_sites_are_rejected() {
        let guard = guard("127.0.0.1:8001", None);
        let host = ("host", "127.0.0.1:8001");
        assert_eq!(code(&guard, &[host, ("origin", "http://127.0.0.1:8001")]), None);
        for origin in ["http://evil.example", "http://127.0.0.1:80", "null", "http://127.0.0.1:8001.evil"] {
            assert_eq!(code(&guard, &[host, ("origin", origin)]), Some("cross_site"), "{origin}");
        }
        assert_eq!(code(&guard, &[host, ("sec-fetch-site", "cross-site")]), Some("cross_site"));
        assert_eq!(code(&guard, &[host, ("sec-fetch-site", "same-origin")]), None);
    }

    #[test]
    fn changes_need_the_token_if_one_is_set_or_the_port_is_not_on_loopback() {
        let host = ("host", "127.0.0.1");
        let open = guard("0.0.0.0:8001", None);
        assert!(open.is_read_only() && !guard("[::1]:1", None).is_read_only());
        assert_eq!(code(&open, &[host]), Some("read_only"));
        for address in ["0.0.0.0:8001", "127.0.0.1:8001"] {
            let guard = guard(address, Some("secret-token"));
            assert!(!guard.is_read_only() && !format!("{guard:?}").contains("secret"));
            assert_eq!(code(&guard, &[host]), Some("unauthorized"));
            for wrong in ["Bearer secret-toke", "Bearer secret-tokem", "secret-token", "Basic secret-token", "Bearer "]
            {
                assert_eq!(code(&guard, &[host, ("authorization", wrong)]), Some("unauthorized"), "{wrong}");
            }
            assert_eq!(code(&guard, &[host, ("authorization", "Bearer secret-token")]), None);
            assert_eq!(code(&guard, &[host, ("authorization", "bearer secret-token")]), None);
        }
    }
}
