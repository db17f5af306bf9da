//! `GET /api/openapi.json`: the description of all calls. A test compares it with the routes and with real answers.

use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;

/// As in version 3.1 of the `OpenAPI` specification.
pub(super) const DESCRIPTION: &str = include_str!("openapi.json");

pub(super) async fn get() -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], DESCRIPTION)
}
