//! Access to the side port: reads the token and builds the rules.

use super::StartError;
use crate::api;
use crate::config;

/// The access rules of the side port.
pub(super) fn guard(api: &config::Api, token: Option<&str>) -> Result<api::Guard, StartError> {
    let from_file = api.token_file.as_ref().map(|path| {
        let text = std::fs::read_to_string(path)
            .map_err(|error| StartError::Token { path: path.clone(), problem: error.to_string() })?;
        let token = text.trim().to_owned();
        let is_token = !token.is_empty() && token.chars().all(|c| c.is_ascii_graphic());
        let problem =
            "the file does not contain a valid token: write one line of printable characters without spaces".to_owned();
        if is_token { Ok(token) } else { Err(StartError::Token { path: path.clone(), problem }) }
    });
    let from_file = from_file.transpose()?;
    let token = from_file.as_deref().or(token.filter(|token| !token.is_empty()));
    let guard = api::Guard::new(api.listen, token, api.allowed_hosts.clone(), api.public_request);
    if guard.is_read_only() {
        tracing::warn!(listen = %api.listen, "the side port is read-only: it is not on loopback and has no token");
    }
    Ok(guard)
}
