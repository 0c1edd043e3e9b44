//! Sends lines of logs to the log server (docs/protocol.md: "Pushing logs").

use std::cell::Cell;
use std::io::{self, Write as _};
use std::rc::Rc;

use actors::errors::Cause;
use actors::job::PushTarget;
use actors::ports::{LogBatch, LogServer, PushError};
use awc::ClientRequest;
use awc::error::SendRequestError;
use awc::http::{StatusCode, header};
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;

use crate::remote::http_client::{HttpClients, HttpError, authorization, parse_url};
use crate::remote::hub::{PATIENCE, USER_AGENT, may_be_from_control_plane};

/// Limit for a log server's response, in bytes: it is read into memory.
const LARGEST_RESPONSE: usize = 1 << 20;

/// Sends logs to the log server that each job names.
pub struct HttpLogServer {
    clients: Rc<HttpClients>,
    /// Whether the log server accepts compressed bodies, according to its last response about that.
    compress: Rc<Cell<bool>>,
}

impl HttpLogServer {
    /// Sends logs with `clients`.
    pub fn new(clients: Rc<HttpClients>) -> Self {
        Self { clients, compress: Rc::default() }
    }
}

fn compressed(bytes: &[u8]) -> io::Result<Bytes> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?.into())
}

impl HttpLogServer {
    fn request(&self, target: &PushTarget, first_line: u64) -> Result<ClientRequest, HttpError> {
        let and = if target.url.contains('?') { '&' } else { '?' };
        let url = parse_url(&format!("{}{and}start_from={first_line}", target.url))?;
        Ok(self
            .clients
            .for_url(&url)?
            .post(url)
            .insert_header((header::USER_AGENT, USER_AGENT))
            .insert_header((header::CONTENT_TYPE, "text/plain"))
            .insert_header((header::AUTHORIZATION, authorization("Bearer", &target.token)?)))
    }
}

fn failed(cause: impl Into<Cause>) -> PushError {
    PushError::Failed(cause.into())
}

fn unavailable(cause: impl Into<Cause>) -> PushError {
    PushError::Unavailable(cause.into())
}

impl LogServer for HttpLogServer {
    fn push(
        &self,
        target: &PushTarget,
        first_line: u64,
        batch: LogBatch,
    ) -> LocalBoxFuture<'static, Result<(), PushError>> {
        let request = self.request(target, first_line);
        let compress = Rc::clone(&self.compress);
        async move {
            let mut request = request.map_err(failed)?;
            let mut body = batch.bytes;
            if compress.get() {
                let packed = actix_rt::task::spawn_blocking(move || compressed(&body)).await;
                body = packed.map_err(failed)?.map_err(failed)?;
                request = request.insert_header((header::CONTENT_ENCODING, "gzip"));
            }
            let response = request.send_body(body).await.map_err(|error| match error {
                SendRequestError::Timeout => PushError::TimedOut,
                error @ SendRequestError::Connect(_) => unavailable(HttpError::from(error)),
                error => failed(HttpError::from(error)),
            })?;
            let mut response = response.timeout(PATIENCE);
            let encodings = response.headers().get_all(header::ACCEPT_ENCODING);
            if encodings.filter_map(|value| value.to_str().ok()).any(|value| value.contains("gzip"))
            {
                compress.set(true);
            }
            let status = response.status();
            // Read in any case, so that the connection can be used again.
            let body = response.body().limit(LARGEST_RESPONSE).await;
            match status {
                StatusCode::UNAUTHORIZED => Err(PushError::Unauthorized),
                StatusCode::UNPROCESSABLE_ENTITY => Err(PushError::QuotaUsedUp),
                StatusCode::PAYLOAD_TOO_LARGE => Err(PushError::TooLarge),
                StatusCode::OK => {
                    // A response that was cut is no acknowledgment.
                    let body = body.map_err(|error| failed(error.to_string()))?;
                    if may_be_from_control_plane(&body) {
                        Ok(())
                    } else {
                        Err(failed(HttpError::Foreign))
                    }
                }
                status if status.is_server_error() => {
                    Err(unavailable(HttpError::from_status(status)))
                }
                status => {
                    if status == StatusCode::UNSUPPORTED_MEDIA_TYPE {
                        compress.set(false);
                    }
                    Err(failed(HttpError::from_status(status)))
                }
            }
        }
        .boxed_local()
    }
}
