//! `GET /`: a page for people. Its files are part of the binary, and it asks no other host for anything.
//!
//! The page shows text of backends and replicas, which may be hostile. It sets all values as text, and the policy below lets the
//! browser run only the script of this page.

use std::sync::Arc;

use axum::Router;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::middleware::from_fn_with_state;
use axum::response::IntoResponse;
use axum::routing::get;

use super::{State, guard};

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      frame-ancestors 'none'; form-action 'none'; base-uri 'none'";

/// The files: path, type and content.
const FILES: [(&str, &str, &str); 4] = [
    ("/", "text/html; charset=utf-8", include_str!("page/index.html")),
    ("/page/style.css", "text/css; charset=utf-8", include_str!("page/style.css")),
    ("/page/app.js", "text/javascript; charset=utf-8", include_str!("page/app.js")),
    ("/page/icon.svg", "image/svg+xml", include_str!("page/icon.svg")),
];

/// The routes of the page. The files hold no secret: what the page shows, it asks for with the token.
pub(super) fn routes(state: &Arc<State>) -> Router<Arc<State>> {
    let router = FILES.into_iter().fold(Router::new(), |router, (path, kind, content)| {
        router.route(path, get(move || async move { file(kind, content) }))
    });
    router.route_layer(from_fn_with_state(Arc::clone(state), guard::page))
}

fn file(kind: &'static str, content: &'static str) -> impl IntoResponse {
    let headers = [
        (CONTENT_TYPE, kind),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        // The next version of Ringway has other files.
        (CACHE_CONTROL, "no-store"),
    ];
    (headers, content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_small_and_asks_nobody_else() {
        let size: usize = FILES.iter().map(|(.., content)| content.len()).sum();
        assert!(size <= 60 * 1024, "{size} bytes");
        for (path, _, content) in FILES {
            let foreign = content.match_indices("//").filter(|(at, _)| content[..*at].ends_with(':'));
            let foreign: Vec<_> =
                foreign.map(|(at, _)| &content[at.saturating_sub(6)..(at + 30).min(content.len())]).collect();
            assert!(foreign.iter().all(|text| text.contains("www.w3.org")), "{path}: {foreign:?}");
            for banned in
                ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", " onclick", "javascript:"]
            {
                assert!(!content.contains(banned), "{path} has {banned}");
            }
        }
    }
}
