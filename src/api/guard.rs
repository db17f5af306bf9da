//! Decides who may call the side port.
//!
//! A web page that is open in a browser on this machine can send requests to 127.0.0.1. The guard therefore rejects
//! calls that name a foreign host (DNS rebinding), and calls with an effect that come from another site, even with a
//! valid token. Calls with an effect also need the token, or a side port on loopback.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{ConnectInfo, Request, State as Extract};
use axum::http::header::{AUTHORIZATION, HOST, HeaderName, ORIGIN, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::State;
use super::error::Error;
use crate::label_enum;
use crate::labels::{Label as _, Tally};

/// Time between two log lines about rejected calls.
const QUIET: Duration = Duration::from_secs(10);

label_enum! {
    /// Why a call was rejected.
    pub enum Rejection {
        /// The `host` header names another host.
        ForeignHost => "foreign_host",
        /// The call comes from a web page of another site.
        CrossSite => "cross_site",
        /// The side port has no token and is not on loopback.
        ReadOnly => "read_only",
        /// The token is missing or wrong.
        Unauthorized => "unauthorized",
    }
}

/// The access rules of the side port.
pub struct Guard {
    token: Option<Arc<str>>,
    allowed_hosts: Vec<String>,
    is_loopback: bool,
    is_request_public: bool,
    rejections: Tally<Rejection>,
    /// When a rejected call was last logged, and the number of them since.
    logged: Mutex<(Option<Instant>, u64)>,
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
    /// With `is_request_public`, everyone may call `/api/request`.
    pub fn new(address: SocketAddr, token: Option<&str>, allowed_hosts: Vec<String>, is_request_public: bool) -> Self {
        let is_loopback = address.ip().to_canonical().is_loopback();
        let (token, rejections, logged) = (token.map(Into::into), Tally::default(), Mutex::default());
        Self { token, allowed_hosts, is_loopback, is_request_public, rejections, logged }
    }

    /// Rejected calls so far.
    pub fn rejections(&self) -> &Tally<Rejection> {
        &self.rejections
    }

    /// Whether this side port rejects every change.
    pub fn is_read_only(&self) -> bool {
        self.token.is_none() && !self.is_loopback
    }

    /// Whether the `host` header names this host.
    pub(super) fn names_this_host(&self, headers: &HeaderMap) -> bool {
        self.is_ours(text(headers, HOST).unwrap_or_default())
    }

    /// The rule for all calls under `/api`.
    fn check_host(&self, headers: &HeaderMap) -> Result<(), Error> {
        let host = text(headers, HOST).unwrap_or_default();
        if self.is_ours(host) {
            return Ok(());
        }
        let message = format!(
            "the host {host:?} is not allowed: call the side port by its IP address or as localhost, or add the name to \
             api.allowed_hosts"
        );
        Err(rejection(StatusCode::MISDIRECTED_REQUEST, Rejection::ForeignHost, message))
    }

    /// The further rule for calls with an effect.
    fn check_origin(headers: &HeaderMap) -> Result<(), Error> {
        let text = |name| text(headers, name);
        let host = text(HOST).unwrap_or_default();
        let is_own_origin = |origin: &str| origin.split_once("://").is_some_and(|(_, from)| from == host);
        let is_cross_site = text(ORIGIN).is_some_and(|origin| !is_own_origin(origin))
            || text(HeaderName::from_static("sec-fetch-site"))
                .is_some_and(|site| site.ends_with("-site") && site != "same-site");
        if is_cross_site {
            let message = "the request comes from a web page of another site, and Ringway does not accept this call from other sites";
            return Err(rejection(StatusCode::FORBIDDEN, Rejection::CrossSite, message));
        }
        Ok(())
    }

    /// The rule for calls with an effect that not everyone may make.
    fn check_token(&self, headers: &HeaderMap) -> Result<(), Error> {
        let Some(token) = &self.token else {
            if self.is_loopback {
                return Ok(());
            }
            let message = "this side port is read-only, because it has no token and is not on loopback. It accepts no changes and \
                           lists no connections: set api.token_file or RINGWAY_TOKEN, and restart";
            return Err(rejection(StatusCode::FORBIDDEN, Rejection::ReadOnly, message));
        };
        let given = text(headers, AUTHORIZATION).and_then(|value| {
            let (scheme, given) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| given.trim())
        });
        if given.is_some_and(|given| is_equal(given.as_bytes(), token.as_bytes())) {
            return Ok(());
        }
        let what = if given.is_some() { "wrong" } else { "missing" };
        let message =
            format!("{what} token: send the header `authorization: Bearer TOKEN` with the token of the side port");
        Err(rejection(StatusCode::UNAUTHORIZED, Rejection::Unauthorized, message))
    }

    fn check_change(&self, headers: &HeaderMap) -> Result<(), Error> {
        self.check_host(headers)?;
        Self::check_origin(headers)?;
        self.check_token(headers)
    }

    fn check_request(&self, headers: &HeaderMap) -> Result<(), Error> {
        self.check_host(headers)?;
        Self::check_origin(headers)?;
        if self.is_request_public { Ok(()) } else { self.check_token(headers) }
    }

    /// Counts a rejected call, and logs it unless one was logged a moment ago.
    fn note(&self, rejection: Rejection, request: &Request) {
        self.rejections.count(rejection);
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, since) = &mut *logged;
        *since += 1;
        if last.is_some_and(|last| last.elapsed() < QUIET) {
            return;
        }
        *last = Some(Instant::now());
        let calls = std::mem::take(since);
        drop(logged);
        let caller = request.extensions().get().map(|ConnectInfo(caller): &ConnectInfo<SocketAddr>| caller.to_string());
        let (method, path) = (request.method(), request.uri().path());
        tracing::warn!(caller, %method, path, why = rejection.as_str(), calls, "rejected a call to the side port");
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

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).map(|value| value.to_str().unwrap_or("?"))
}

fn rejection(status: StatusCode, rejection: Rejection, message: impl Into<String>) -> Error {
    Error::new(status, rejection.as_str(), message)
}

/// Middleware for calls that read.
pub(super) async fn reads(Extract(state): Extract<Arc<State>>, request: Request, next: Next) -> Response {
    enforce(&state.guard, Guard::check_host, request, next).await
}

/// Middleware for the files of the page. Off loopback, the page is there only with a token.
pub(super) async fn page(Extract(state): Extract<Arc<State>>, request: Request, next: Next) -> Response {
    let check = |guard: &Guard, headers: &HeaderMap| {
        guard.check_host(headers)?;
        if guard.is_read_only() { guard.check_token(headers) } else { Ok(()) }
    };
    enforce(&state.guard, check, request, next).await
}

/// Middleware for calls that change something.
pub(super) async fn changes(Extract(state): Extract<Arc<State>>, request: Request, next: Next) -> Response {
    enforce(&state.guard, Guard::check_change, request, next).await
}

/// Middleware for `/api/request`, which reaches the servers of the pools.
pub(super) async fn requests(Extract(state): Extract<Arc<State>>, request: Request, next: Next) -> Response {
    enforce(&state.guard, Guard::check_request, request, next).await
}

/// Passes an allowed call on, or responds with an error.
async fn enforce(
    guard: &Guard,
    check: fn(&Guard, &HeaderMap) -> Result<(), Error>,
    request: Request,
    next: Next,
) -> Response {
    let Err(error) = check(guard, request.headers()) else { return next.run(request).await };
    if let Some(&rejection) = Rejection::ALL.iter().find(|one| one.as_str() == error.code()) {
        guard.note(rejection, &request);
    }
    let mut response = error.into_response();
    if response.status() == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(guard: &Guard, headers: &[(&'static str, &str)]) -> Option<&'static str> {
        let mut map = HeaderMap::new();
        for &(name, value) in headers {
            map.insert(name, value.parse().unwrap());
        }
        guard.check_change(&map).err().map(|error| error.code())
    }

    fn guard(address: &str, token: Option<&str>) -> Guard {
        Guard::new(address.parse().unwrap(), token, vec!["balancer".to_owned()], false)
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

    #[test]
    fn requests_to_backends_need_the_token_unless_they_are_public() {
        let headers = |pairs: &[(&'static str, &str)]| {
            let headers = pairs.iter().map(|&(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
            headers.collect::<HeaderMap>()
        };
        let code = |guard: &Guard, pairs: &[(&'static str, &str)]| {
            guard.check_request(&headers(pairs)).err().map(|error| error.code())
        };
        let guard = |public| Guard::new(([0, 0, 0, 0], 1).into(), Some("secret"), Vec::new(), public);
        let host = ("host", "10.0.0.1");
        assert_eq!(code(&guard(false), &[host]), Some("unauthorized"));
        assert_eq!(code(&guard(false), &[host, ("authorization", "Bearer secret")]), None);
        assert_eq!(code(&guard(true), &[host]), None);
        // No web page may reach the servers, whoever else may.
        assert_eq!(code(&guard(true), &[("host", "evil.example")]), Some("foreign_host"));
        assert_eq!(code(&guard(true), &[host, ("origin", "http://evil.example")]), Some("cross_site"));
    }
}
