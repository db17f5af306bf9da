//! Who may change something by the side port.
//!
//! A web page that somebody on this machine looks at can send requests to 127.0.0.1 as well: so calls that change
//! something are refused when they name a foreign host (DNS rebinding) or come from another site, token or not.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Request, State as Extract};
use axum::http::header::{AUTHORIZATION, HOST, HeaderName, ORIGIN, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::State;
use super::error::Error;

/// The rules.
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
    /// Rules for a side port that listens on `address`. Without a token only one on loopback takes changes.
    pub fn new(address: SocketAddr, token: Option<&str>, allowed_hosts: Vec<String>) -> Self {
        Self { token: token.map(Into::into), allowed_hosts, is_loopback: address.ip().to_canonical().is_loopback() }
    }

    /// Nothing can be changed by this side port.
    pub fn is_read_only(&self) -> bool {
        self.token.is_none() && !self.is_loopback
    }

    fn check(&self, headers: &HeaderMap) -> Result<(), Error> {
        let text = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
        let host = text(HOST).unwrap_or_default();
        if !self.is_ours(host) {
            let message = format!(
                "this is not {host:?}: call the side port by its address or as localhost, or add the name to api.allowed_hosts"
            );
            return Err(Error::new(StatusCode::MISDIRECTED_REQUEST, "foreign_host", message));
        }
        let is_own_origin = |origin: &str| origin.split_once("://").is_some_and(|(_, from)| from == host);
        let is_cross_site = text(ORIGIN).is_some_and(|origin| !is_own_origin(origin))
            || text(HeaderName::from_static("sec-fetch-site"))
                .is_some_and(|site| site.ends_with("-site") && site != "same-site");
        if is_cross_site {
            let message = "a page of another site may not change anything here";
            return Err(Error::new(StatusCode::FORBIDDEN, "cross_site", message));
        }
        let Some(token) = &self.token else {
            if self.is_loopback {
                return Ok(());
            }
            let message = "this side port is read-only: it is not on loopback and has no token; set api.token_file or \
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
        let message = "this call needs the header `authorization: Bearer TOKEN`, with the side port's token";
        Err(Error::new(StatusCode::UNAUTHORIZED, "unauthorized", message))
    }

    /// Whether a header `host` names this side port. An address cannot be made to point elsewhere; a name can.
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

/// In a time that does not tell where they differ.
fn is_equal(one: &[u8], other: &[u8]) -> bool {
    one.len() == other.len() && std::iter::zip(one, other).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
}

/// Lets a call through that may change something, or answers it.
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
    fn addresses_and_known_names_are_ours_and_others_are_not() {
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
    fn pages_of_other_sites_are_refused() {
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
    fn a_token_is_needed_where_there_is_one_and_off_loopback() {
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
