//! `GET /metrics`: renders the metrics away from the threads that others wait for, and shares a costly text.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::State as Extract;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use bytes::Bytes;
use futures_util::stream;
use tokio::sync::Mutex;
use tokio::task::JoinError;

use super::State;
use super::error::Error;
use super::exposition;
use crate::metrics::text::Format;

/// The last rendered texts, which scrapes at about the same time share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    prometheus: Slot,
    open_metrics: Slot,
}

/// The last text in one format.
type Slot = Arc<Mutex<Option<Rendered>>>;

#[derive(Debug, Clone)]
struct Rendered {
    pieces: Arc<[Bytes]>,
    fresh_until: Instant,
}

/// A text that took at least this long is shared. Quicker ones are always new.
const COSTLY: Duration = Duration::from_millis(5);

/// A costly text is shared for this many times the time that it took, so that scrapers take a tenth of one processor,
/// whatever their number.
const SHARED_FOR: u32 = 9;

/// Longest time for which a text is shared.
const LONGEST: Duration = Duration::from_secs(1);

impl Shared {
    fn slot(&self, format: Format) -> &Slot {
        match format {
            Format::Prometheus => &self.prometheus,
            Format::OpenMetrics => &self.open_metrics,
        }
    }
}

/// The last text if it is fresh; else a new one. Only one is rendered at a time, on a thread for blocking work.
async fn share(slot: &Slot, render: impl FnOnce() -> Vec<Bytes> + Send + 'static) -> Result<Arc<[Bytes]>, JoinError> {
    let mut last = Arc::clone(slot).lock_owned().await;
    if let Some(last) = last.as_ref().filter(|last| Instant::now() < last.fresh_until) {
        return Ok(Arc::clone(&last.pieces));
    }
    let shared = Arc::clone(slot);
    let runtime = tokio::runtime::Handle::current();
    let rendered = tokio::task::spawn_blocking(move || {
        let began = Instant::now();
        let pieces: Arc<[Bytes]> = render().into();
        let took = began.elapsed();
        // The lock ends here, even if the scraper has gone: no second text is rendered at the same time.
        if took >= COSTLY {
            let fresh_until = Instant::now() + (took * SHARED_FOR).min(LONGEST);
            *last = Some(Rendered { pieces: Arc::clone(&pieces), fresh_until });
            drop(last);
            runtime.spawn(forget(shared, fresh_until));
        }
        pieces
    });
    rendered.await
}

/// Frees a text that is no longer fresh: it can have many megabytes.
async fn forget(slot: Slot, fresh_until: Instant) {
    tokio::time::sleep_until(fresh_until.into()).await;
    let mut last = slot.lock().await;
    if last.as_ref().is_some_and(|last| last.fresh_until <= fresh_until) {
        *last = None;
    }
}

pub(super) async fn metrics(
    Extract(state): Extract<Arc<State>>,
    headers: HeaderMap,
) -> Result<impl IntoResponse, Error> {
    let format = format(&headers);
    let rendered = Arc::clone(&state);
    let pieces = share(state.scrape.slot(format), move || exposition::text(&rendered, format)).await;
    let pieces = pieces.map_err(|_panicked| {
        Error::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "cannot render the metrics; see the log")
    })?;
    let mut next = 0;
    // One piece after the other: a copy in one piece would double the memory.
    let pieces = stream::iter(std::iter::from_fn(move || {
        next += 1;
        pieces.get(next - 1).cloned().map(Ok::<_, Infallible>)
    }));
    Ok(([(CONTENT_TYPE, format.content_type())], Body::from_stream(pieces)))
}

/// OpenMetrics where the scraper accepts it: Prometheus does.
fn format(headers: &HeaderMap) -> Format {
    let accepts = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let kinds = accepts.flat_map(|value| value.split(','));
    let is_open = |kind: &str| {
        let mut parts = kind.split(';').map(str::trim);
        let is_kind = parts.next() == Some("application/openmetrics-text");
        // Version 0.0.1 is a draft that Prometheus also asks for.
        is_kind
            && parts.all(|part| match part.split_once('=') {
                Some(("version", version)) => version == "1.0.0",
                Some(("q", quality)) => quality.parse::<f32>().is_ok_and(|quality| quality > 0.0),
                _ => true,
            })
    };
    if kinds.into_iter().any(is_open) { Format::OpenMetrics } else { Format::Prometheus }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn scrapes_at_the_same_time_share_one_text_which_is_then_freed() {
        static RENDERED: AtomicUsize = AtomicUsize::new(0);
        let slot = Slot::default();
        let mut scrapers = tokio::task::JoinSet::new();
        for _ in 0..16 {
            let slot = Arc::clone(&slot);
            scrapers.spawn(async move {
                let render = || {
                    // As with thousands of backends.
                    std::thread::sleep(Duration::from_millis(200));
                    vec![RENDERED.fetch_add(1, Ordering::Relaxed).to_string().into()]
                };
                share(&slot, render).await.unwrap()
            });
        }
        let texts = scrapers.join_all().await;
        assert!(texts.iter().all(|text| text[0] == "0"), "{texts:?}");
        while slot.lock().await.is_some() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(share(&slot, || vec!["new".into()]).await.unwrap()[0], "new");
        assert!(slot.lock().await.is_none(), "a text that took no time is kept");
    }

    #[test]
    fn the_format_is_open_metrics_where_the_scraper_accepts_its_first_version() {
        let accepts = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, value.parse().unwrap());
            format(&headers)
        };
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,\
                          text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        assert_eq!(accepts(prometheus), Format::OpenMetrics);
        assert_eq!(accepts("application/openmetrics-text"), Format::OpenMetrics);
        let refused = "application/openmetrics-text;q=0";
        for other in ["*/*", "text/plain", "application/openmetrics-text; version=0.0.1", refused] {
            assert_eq!(accepts(other), Format::Prometheus, "{other}");
        }
        assert_eq!(format(&HeaderMap::new()), Format::Prometheus);
    }
}
