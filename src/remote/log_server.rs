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

use crate::remote::http_client::{HttpClients, parse_url, words_of_send_error};
use crate::remote::hub::{PATIENCE, SOMEBODY_ELSES, USER_AGENT, is_own_answer};

/// What a log server may answer, in bytes; it is not looked at.
const LARGEST_ANSWER: usize = 1 << 20;

/// See the module.
pub struct HttpLogServer {
    clients: Rc<HttpClients>,
    /// The log server has said that it takes compressed bodies.
    compress: Rc<Cell<bool>>,
}

impl HttpLogServer {
    /// Sends with `clients`.
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
        let and = if target.url.contains('?') { '&' } else { '?' };
        let url = format!("{}{and}start_from={first_line}", target.url);
        let request = parse_url(&url).map_err(str::to_owned).and_then(|url| {
            let client = self.clients.for_url(&url).map_err(|error| format!("no TLS: {error}"))?;
            let token = header::HeaderValue::try_from(format!("Bearer {}", target.token))
                .map_err(|_| "the token can't stand in a header".to_owned())?;
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
                    PushError::Unavailable(words_of_send_error(&error))
                }
                error => failed(words_of_send_error(&error)),
            })?;
            let mut response = response.timeout(PATIENCE);
            let asked = response.headers().get_all(header::ACCEPT_ENCODING);
            if asked.filter_map(|value| value.to_str().ok()).any(|value| value.contains("gzip")) {
                compress.set(true);
            }
            let status = response.status();
            // Read, so that the connection can be used again; an answer that is cut is none.
            let body = response.body().limit(LARGEST_ANSWER).await;
            match status {
                StatusCode::UNAUTHORIZED => Err(PushError::Unauthorized),
                StatusCode::UNPROCESSABLE_ENTITY => Err(PushError::QuotaUsedUp),
                StatusCode::PAYLOAD_TOO_LARGE => Err(PushError::TooLarge),
                StatusCode::UNSUPPORTED_MEDIA_TYPE if compress.get() => {
                    compress.set(false);
                    Err(failed(format!("the answer is {status}")))
                }
                StatusCode::OK => {
                    let body = body.map_err(|error| failed(error.to_string()))?;
                    if is_own_answer(&body) { Ok(()) } else { Err(failed(SOMEBODY_ELSES.into())) }
                }
                status if status.is_server_error() => {
                    Err(PushError::Unavailable(format!("the answer is {status}")))
                }
                status => Err(failed(format!("the answer is {status}"))),
            }
        }
        .boxed_local()
    }
}
