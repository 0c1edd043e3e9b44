//! A raw connection to a container's terminal: an HTTP request after which both sides stop speaking HTTP.
//!
//! The client library can't be used for it: it takes the first bytes from a terminal for the header of a
//! multiplexed frame.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf as _, BytesMut};
use memchr::memmem;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use super::engine::EngineAddress;
use crate::executors::session::Terminal;

/// The size of the buffer for a response's head, in bytes.
const READ: usize = 4096;

/// The largest head of a response, and the largest body of an error response, in bytes.
const LONGEST: usize = 16 << 10;

trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

/// A container's terminal: writing types into the container, reading returns what was printed there.
pub struct ContainerTerminal {
    stream: Box<dyn Stream>,
    /// Bytes of the terminal that arrived together with the response's head.
    early: BytesMut,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum HijackError {
    /// The connection failed.
    #[error("the connection to the engine failed")]
    Io(#[from] io::Error),
    /// The engine refused the request, with this message.
    #[error("{0}")]
    Refused(String),
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Refusal {
    message: String,
}

impl ContainerTerminal {
    /// Sends a `POST` of `path` (with API version and query), and takes over the connection.
    pub async fn open(address: &EngineAddress, path: &str) -> Result<Self, HijackError> {
        let response =
            Response::to_post(address, path, "Connection: Upgrade\r\nUpgrade: tcp\r\n", b"")
                .await?;
        // Some engines respond with 200 instead of 101, and switch protocols all the same.
        let is_raw = response.head.contains("content-type: application/vnd.docker.raw-stream");
        if response.status == 101 || (response.status == 200 && is_raw) {
            let Response { stream, early, .. } = response;
            return Ok(Self { stream, early });
        }
        Err(response.refusal().await)
    }
}

/// Sends a `POST` of `path` (with API version) with a JSON body.
pub async fn post(address: &EngineAddress, path: &str, body: &[u8]) -> Result<(), HijackError> {
    let headers = "Connection: close\r\nContent-Type: application/json\r\n";
    let response = Response::to_post(address, path, headers, body).await?;
    if (200..300).contains(&response.status) { Ok(()) } else { Err(response.refusal().await) }
}

/// A response of which only the head was read so far.
struct Response {
    stream: Box<dyn Stream>,
    status: u16,
    /// Status line and headers, in lower case.
    head: String,
    /// Bytes of the body that arrived together with the head.
    early: BytesMut,
}

impl Response {
    async fn to_post(
        address: &EngineAddress,
        path: &str,
        headers: &str,
        body: &[u8],
    ) -> Result<Self, io::Error> {
        let mut stream: Box<dyn Stream> = match address {
            EngineAddress::Unix(socket) => Box::new(UnixStream::connect(socket).await?),
            EngineAddress::Tcp(address) => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                Box::new(stream)
            }
        };
        let length = body.len();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: docker\r\n{headers}Content-Length: {length}\r\n\r\n"
        );
        stream.write_all(&[head.as_bytes(), body].concat()).await?;
        let mut early = BytesMut::with_capacity(READ);
        let end = loop {
            if let Some(end) = memmem::find(&early, b"\r\n\r\n") {
                break end;
            }
            if early.len() > LONGEST || stream.read_buf(&mut early).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        };
        let head = String::from_utf8_lossy(&early[..end]).to_ascii_lowercase();
        early.advance(end + 4);
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        Ok(Self { stream, status, head, early })
    }

    async fn refusal(mut self) -> HijackError {
        let length = self.head.lines().find_map(|line| line.strip_prefix("content-length:"));
        let length = length.and_then(|length| length.trim().parse().ok()).unwrap_or(LONGEST);
        while self.early.len() < length.min(LONGEST) {
            match self.stream.read_buf(&mut self.early).await {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => return error.into(),
            }
        }
        // Some errors are JSON, and others plain text.
        let words = match serde_json::from_slice::<Refusal>(&self.early) {
            Ok(refusal) => refusal.message,
            Err(_) => String::from_utf8_lossy(&self.early).into_owned(),
        };
        HijackError::Refused(match words.trim() {
            "" => format!("the engine responded with status {}", self.status),
            words => words.to_owned(),
        })
    }
}

impl Terminal for ContainerTerminal {
    /// Does nothing: only the shell in the container can set the modes. It checks that typed text arrives.
    fn reset_modes(&self) -> io::Result<()> {
        Ok(())
    }
}

impl AsyncRead for ContainerTerminal {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.early.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buffer);
        }
        let count = self.early.len().min(buffer.remaining());
        buffer.put_slice(&self.early[..count]);
        self.early.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ContainerTerminal {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
