//! One HTTP/1.1 exchange over one connection, for health checks, forwarded requests and `ringway status`.

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::task::AbortOnDropHandle;

/// Why an exchange failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection broke, or the response is not HTTP.
    #[error(transparent)]
    Http(#[from] hyper::Error),
    /// The response body ended early or is longer than the caller accepts.
    #[error("cannot read the response body: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
}

/// Sends `request` and reads the complete response. The body may have up to `limit` bytes. Sets no timeout: dropping
/// the future closes the connection.
///
/// # Errors
/// When no complete response arrives.
pub async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Full<Bytes>>,
    limit: usize,
) -> Result<Response<Bytes>, Error> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // If the connection fails, the exchange fails too and reports the error.
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let (head, body) = sender.send_request(request).await?.into_parts();
    let body = Limited::new(body, limit).collect().await.map_err(Error::Body)?;
    Ok(Response::from_parts(head, body.to_bytes()))
}
