//! A client's connection until it has a backend.

use crate::stream::Stream;

/// A client's connection that is not served yet. Dropping it, even in a panic or at the end of the runtime, resets it, so
/// no client takes it for a clean end.
pub(super) struct NotServed(Option<Stream>);

impl NotServed {
    pub(super) fn new(client: Stream) -> Self {
        Self(Some(client))
    }

    pub(super) fn stream(&self) -> &Stream {
        // Only `serve` takes the stream, and it consumes `self`.
        self.0.as_ref().unwrap_or_else(|| unreachable!("the stream was taken"))
    }

    /// The stream, which from now on ends as its new owner ends it.
    pub(super) fn serve(mut self) -> Stream {
        self.0.take().unwrap_or_else(|| unreachable!("the stream was taken"))
    }

    /// Waits until the client resets the connection or is lost. The end of its stream is not enough: it may wait for an
    /// answer. So a client on a Unix socket that closes its socket is noticed only by the relay.
    pub(super) async fn is_reset(&self) {
        let stream = self.stream();
        if stream.wait_for_error().await.is_ok() && !stream.is_cut_off() {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for NotServed {
    fn drop(&mut self) {
        if let Some(stream) = &self.0 {
            stream.reset_on_close();
        }
    }
}
