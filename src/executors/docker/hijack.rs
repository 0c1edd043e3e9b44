//! A raw connection to a container's terminal: an HTTP request that both sides stop speaking HTTP after.
//!
//! Not by the client library: its reader takes the first bytes of a terminal for a frame's header.

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

/// How much is read at once before the terminal begins, in bytes.
const READ: usize = 4096;

/// The longest head of an answer, and the longest refusal, in bytes.
const LONGEST: usize = 16 << 10;

trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

/// What is written to it is typed in the container, what is read from it was printed there.
pub struct ContainerTerminal {
    stream: Box<dyn Stream>,
    /// What came together with the answer's head.
    early: BytesMut,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum HijackError {
    /// The connection failed.
    #[error("the connection to the engine failed: {0}")]
    Io(#[from] io::Error),
    /// The engine refused.
    #[error("{0}")]
    Refused(String),
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Refusal {
    message: String,
}

impl ContainerTerminal {
    /// Sends a `POST` of `path`, which has the API's version and the query, and takes over the connection.
    pub async fn open(address: &EngineAddress, path: &str) -> Result<Self, HijackError> {
        let answer =
            Answer::to(address, path, "Connection: Upgrade\r\nUpgrade: tcp\r\n", b"").await?;
        // Some answer 200 and stop speaking HTTP all the same.
        let is_raw = answer.head.contains("content-type: application/vnd.docker.raw-stream");
        if answer.status == 101 || (answer.status == 200 && is_raw) {
            let Answer { stream, early, .. } = answer;
            return Ok(Self { stream, early });
        }
        Err(answer.refusal().await)
    }
}

/// Sends a `POST` of a path with its version, with a body in JSON; the engine's words if it refuses.
pub async fn post(address: &EngineAddress, path: &str, body: &[u8]) -> Result<(), HijackError> {
    let headers = "Connection: close\r\nContent-Type: application/json\r\n";
    let answer = Answer::to(address, path, headers, body).await?;
    if (200..300).contains(&answer.status) { Ok(()) } else { Err(answer.refusal().await) }
}

/// The beginning of an answer.
struct Answer {
    stream: Box<dyn Stream>,
    status: u16,
    /// In lower case.
    head: String,
    /// What came with it.
    early: BytesMut,
}

impl Answer {
    async fn to(
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
        // Some refusals are JSON, and some the words themselves.
        let words = match serde_json::from_slice::<Refusal>(&self.early) {
            Ok(refusal) => refusal.message,
            Err(_) => String::from_utf8_lossy(&self.early).into_owned(),
        };
        HijackError::Refused(match words.trim() {
            "" => format!("the engine answers {}", self.status),
            words => words.to_owned(),
        })
    }
}

impl Terminal for ContainerTerminal {
    /// Nobody but the shell itself can: it checks that what is typed comes through.
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
