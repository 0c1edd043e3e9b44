//! Reads logs from their spools and sends them to the platform (docs/protocol.md: "Pushing logs").

use std::cell::Cell;
use std::fs::{self, DirBuilder};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use actors::job::{JobId, PushTarget};
use actors::log::buffer::LogRange;
use actors::ports::{HubError, LogBatch, LogUplink, PushError};
use awc::error::SendRequestError;
use awc::http::{StatusCode, header};
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;

use crate::remote::http_client::{HttpClients, parse_url, words_of_send_error};
use crate::remote::hub::{Hub, PATIENCE, SOMEBODY_ELSES, USER_AGENT, is_own_answer};

/// What a log server may answer, in bytes; it is not looked at.
const LARGEST_ANSWER: usize = 1 << 20;

/// How many undelivered logs are kept.
const MOST_KEPT: usize = 100;

/// How much of a log is read at once, in bytes.
const READ: usize = 64 << 10;

/// See the module.
pub struct HttpLogUplink {
    clients: Rc<HttpClients>,
    hub: Hub,
    /// Where undelivered logs are kept.
    kept: PathBuf,
    /// The log server has said that it takes compressed bodies.
    compress: Rc<Cell<bool>>,
}

impl HttpLogUplink {
    /// Sends with `clients`, and gets its tokens from `hub`.
    pub fn new(clients: Rc<HttpClients>, hub: Hub, kept: PathBuf) -> Self {
        Self { clients, hub, kept, compress: Rc::default() }
    }
}

/// Removes the oldest files of `directory` that are too many.
fn remove_oldest(directory: &Path) -> io::Result<()> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        files.push((entry.metadata()?.modified()?, entry.path()));
    }
    files.sort();
    for (_, path) in files.iter().take(files.len().saturating_sub(MOST_KEPT)) {
        fs::remove_file(path)?;
    }
    Ok(())
}

fn read_lines(range: &LogRange, most_lines: u64, most_bytes: u64) -> io::Result<LogBatch> {
    let mut file = range.reader();
    let mut bytes = Vec::new();
    // What is known to be whole lines, and how many.
    let (mut lines, mut end) = (0, 0);
    loop {
        let old = bytes.len();
        if (&mut file).take(READ as u64).read_to_end(&mut bytes)? == 0 {
            break;
        }
        for newline in memchr::memchr_iter(b'\n', &bytes[old..]) {
            let next = old + newline + 1;
            if lines == most_lines || (lines > 0 && next as u64 > most_bytes) {
                break;
            }
            (lines, end) = (lines + 1, next);
        }
        if lines == most_lines || (lines > 0 && bytes.len() as u64 > most_bytes) {
            break;
        }
    }
    if lines == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    bytes.truncate(end);
    Ok(LogBatch { lines, bytes: bytes.into() })
}

fn compressed(bytes: &[u8]) -> io::Result<Bytes> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?.into())
}

impl LogUplink for HttpLogUplink {
    fn read(
        &self,
        range: &LogRange,
        most_lines: u64,
        most_bytes: u64,
    ) -> LocalBoxFuture<'static, io::Result<LogBatch>> {
        let range = range.clone();
        let read =
            actix_rt::task::spawn_blocking(move || read_lines(&range, most_lines, most_bytes));
        async { read.await.map_err(io::Error::other)? }.boxed_local()
    }

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
                    PushError::Away(words_of_send_error(&error))
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
                    Err(PushError::Away(format!("the answer is {status}")))
                }
                status => Err(failed(format!("the answer is {status}"))),
            }
        }
        .boxed_local()
    }

    fn refresh_token(&self) -> LocalBoxFuture<'static, Result<String, HubError>> {
        let hub = self.hub.clone();
        async move { hub.refresh_token().await }.boxed_local()
    }

    fn keep(&self, job: &JobId, log: &LogRange) -> io::Result<PathBuf> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.kept)?;
        let is_plain = |c: &char| c.is_ascii_alphanumeric() || "-_".contains(*c);
        let name: String = job.as_str().chars().filter(is_plain).take(100).collect();
        for number in 1.. {
            let path = self.kept.join(format!("{name}.{number}.jsonl"));
            match log.source.keep_as(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                linked => {
                    linked?;
                    remove_oldest(&self.kept)?;
                    return Ok(path);
                }
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    fn remove_kept(&self, kept: &Path) -> io::Result<()> {
        fs::remove_file(kept)
    }
}

#[cfg(test)]
mod tests {
    use actors::ports::LogSpool as _;

    use super::*;
    use crate::state::log_file::FileSpool;

    fn spool(directory: &Path, text: &str) -> FileSpool {
        let mut spool = FileSpool::create(directory.join("log")).unwrap();
        spool.append(text.as_bytes()).unwrap();
        spool
    }

    fn range(spool: &FileSpool, start: u64, end: u64) -> LogRange {
        LogRange { source: spool.source(), start, end, next_line: 0, sealed: true }
    }

    #[test]
    fn batches_are_whole_lines_within_both_limits() {
        let directory = tempfile::tempdir().unwrap();
        let lines: Vec<String> =
            (0..5000).map(|i| format!("{i}{}\n", "x".repeat(i * 37 % 90_000))).collect();
        let whole = lines.concat();
        let spool = spool(directory.path(), &whole);
        for (most_lines, most_bytes) in [(2000, 1 << 20), (1, 1), (7, 100), (3000, 64 << 10)] {
            let mut got = Vec::new();
            let mut start = 0;
            while start < 20_000_000 {
                let range = range(&spool, start, whole.len() as u64);
                let LogBatch { lines, bytes } = read_lines(&range, most_lines, most_bytes).unwrap();
                assert!(lines <= most_lines && (bytes.len() as u64 <= most_bytes || lines == 1));
                assert_eq!(memchr::memchr_iter(b'\n', &bytes).count() as u64, lines);
                start += bytes.len() as u64;
                got.extend_from_slice(&bytes);
            }
            assert!(whole.as_bytes().starts_with(&got), "{most_lines} {most_bytes}");
        }
    }

    #[test]
    fn what_is_not_published_yet_is_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let spool = spool(directory.path(), "one\ntwo\nthr");
        let batch = read_lines(&range(&spool, 0, 8), 100, 100).unwrap();
        assert_eq!((batch.lines, &*batch.bytes), (2, &b"one\ntwo\n"[..]));
    }
}
