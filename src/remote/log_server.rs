//! Sends lines of logs to the log server (docs/protocol.md: "Pushing logs").

use std::cell::Cell;
use std::io::{self, Write as _};
use std::rc::Rc;

use actors::job::PushTarget;
use actors::ports::{LogBatch, LogServer, PushError};
use awc::error::SendRequestError;
use awc::http::{StatusCode, header};
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;

use crate::remote::http_client::{HttpClients, describe_send_error, parse_url};
use crate::remote::hub::{FOREIGN_RESPONSE, PATIENCE, USER_AGENT, may_be_from_control_plane};

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

impl LogServer for HttpLogServer {
    fn push(
        &self,
        target: &PushTarget,
        first_line: u64,
        batch: LogBatch,
    ) -> LocalBoxFuture<'static, Result<(), PushError>> {
        let failed = |why: String| PushError::Failed(why);
        let separator = if target.url.contains('?') { '&' } else { '?' };
        let url = format!("{}{separator}start_from={first_line}", target.url);
        let request = parse_url(&url).map_err(str::to_owned).and_then(|url| {
            let client =
                self.clients.for_url(&url).map_err(|error| format!("TLS setup failed: {error}"))?;
            let token = header::HeaderValue::try_from(format!("Bearer {}", target.token)).map_err(
                |_| "the token contains characters that are invalid in a header".to_owned(),
            )?;
            Ok(client
                .post(url)
                .insert_header((header::USER_AGENT, USER_AGENT))
                .insert_header((header::CONTENT_TYPE, "text/plain"))
                .insert_header((header::AUTHORIZATION, token)))
        });
        let compress = Rc::clone(&self.compress);
        async move {
            let mut request = request.map_err(failed)?;
            let mut body = batch.bytes;
            if compress.get() {
                let packed = actix_rt::task::spawn_blocking(move || compressed(&body)).await;
                let packed = packed.map_err(|error| failed(error.to_string()))?;
                body = packed.map_err(|error| failed(error.to_string()))?;
                request = request.insert_header((header::CONTENT_ENCODING, "gzip"));
            }
            let response = request.send_body(body).await.map_err(|error| match error {
                SendRequestError::Timeout => PushError::TimedOut,
                error @ SendRequestError::Connect(_) => {
                    PushError::Unavailable(describe_send_error(&error))
                }
                error => failed(describe_send_error(&error)),
            })?;
            let mut response = response.timeout(PATIENCE);
            let encodings = response.headers().get_all(header::ACCEPT_ENCODING);
            if encodings.filter_map(|value| value.to_str().ok()).any(|value| value.contains("gzip"))
            {
                compress.set(true);
            }
            let status = response.status();
            // The body must be read before the connection can be used again. A `200` whose body is cut off
            // does not count as an acknowledgement.
            let body = response.body().limit(LARGEST_RESPONSE).await;
            match status {
                StatusCode::UNAUTHORIZED => Err(PushError::Unauthorized),
                StatusCode::UNPROCESSABLE_ENTITY => Err(PushError::QuotaUsedUp),
                StatusCode::PAYLOAD_TOO_LARGE => Err(PushError::TooLarge),
                StatusCode::UNSUPPORTED_MEDIA_TYPE if compress.get() => {
                    compress.set(false);
                    Err(failed(format!("the server answered {status}")))
                }
                StatusCode::OK => {
                    let body = body.map_err(|error| failed(error.to_string()))?;
                    if may_be_from_control_plane(&body) {
                        Ok(())
                    } else {
                        Err(failed(FOREIGN_RESPONSE.into()))
                    }
                }
                status if status.is_server_error() => {
                    Err(PushError::Unavailable(format!("the answer is {status}")))
                }
                status => Err(failed(format!("the server answered {status}"))),
            }
        }
        .boxed_local()
    }
}
