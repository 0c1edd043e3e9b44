//! One TLS connection of the API: closes when it is stalled, and detects when a response was sent to its last
//! byte.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};
use tokio_openssl::SslStream;
use tokio_util::sync::WaitForCancellationFutureOwned;

use crate::api::LINGER;
use crate::api::admission::Admitted;
use crate::api::transfer::TransferReport;

/// The connection closes after this time without progress in a read or a write. A response as a whole has no
/// time limit.
const STALLED: Duration = Duration::from_mins(5);

/// Time limit for the headers of a request, from their first byte on. Leftover bytes of a request that has
/// its response count as headers of the next one.
const HEADERS_PATIENCE: Duration = Duration::from_secs(12);

/// A TLS connection with its time limits.
pub(super) struct Connection {
    tls: SslStream<TcpStream>,
    handover: Rc<Handover>,
    stalled: Option<Pin<Box<Sleep>>>,
    /// The number of the request whose headers have begun, and the deadline for their end.
    headers_due: Option<(u64, Pin<Box<Sleep>>)>,
    evicted: Pin<Box<WaitForCancellationFutureOwned>>,
}

/// What the connection shares with the handler of its current request.
pub(super) struct Handover {
    /// Completed once everything written so far is sent. If the connection drops the report instead, the
    /// transfer is reported as broken.
    report: RefCell<Option<TransferReport>>,
    phase: Cell<Phase>,
    /// Whether the connection closes after the current response.
    is_last: Cell<bool>,
    /// How many requests have arrived with whole headers.
    requests: Cell<u64>,
    admitted: Admitted,
}

/// The connection's progress with the current request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The headers of the next request have not arrived whole.
    Waiting,
    /// The request is being handled, or its response is not written to the end.
    Handling,
    /// The response is written, but not flushed.
    Written,
}

impl Handover {
    /// Completes `report` with the next successful flush. Called with the response's last byte.
    pub(super) fn complete_when_flushed(&self, report: TransferReport) {
        self.report.replace(Some(report));
    }

    /// Called when the headers of a request have arrived.
    pub(super) fn request_started(&self) {
        self.phase.set(Phase::Handling);
        self.requests.update(|requests| requests + 1);
        self.admitted.slot().set_busy();
    }

    /// Closes the connection after the response, even if the client goes on sending.
    pub(super) fn close_after_response(&self) {
        self.is_last.set(true);
    }

    /// Called when the response is written to its end.
    pub(super) fn response_written(&self) {
        self.phase.set(Phase::Written);
    }
}

impl Connection {
    /// Takes a stream whose handshake is done.
    pub(super) fn new(tls: SslStream<TcpStream>, admitted: Admitted) -> Self {
        let evicted = Box::pin(admitted.slot().eviction().cancelled_owned());
        let handover = Handover {
            report: RefCell::default(),
            phase: Cell::new(Phase::Waiting),
            is_last: Cell::new(false),
            requests: Cell::new(0),
            admitted,
        };
        Self { tls, handover: Rc::new(handover), stalled: None, headers_due: None, evicted }
    }

    /// Returns whether the connection must close: it is evicted, or the headers of a request are late.
    fn is_over(&mut self, cx: &mut Context<'_>, has_read: bool) -> bool {
        let request = self.handover.requests.get();
        self.headers_due.take_if(|(of, _)| *of != request);
        if self.handover.phase.get() != Phase::Waiting {
            return false;
        }
        let patience = if self.handover.is_last.get() { LINGER } else { HEADERS_PATIENCE };
        if self.headers_due.is_none() && (has_read || self.handover.is_last.get()) {
            self.headers_due = Some((request, Box::pin(sleep(patience))));
        }
        let due = self.headers_due.as_mut();
        let is_late = due.is_some_and(|(_, due)| due.as_mut().poll(cx).is_ready());
        is_late || self.evicted.as_mut().poll(cx).is_ready()
    }

    /// Returns what the handlers of requests share with the connection.
    pub(super) fn handover(&self) -> Rc<Handover> {
        Rc::clone(&self.handover)
    }

    /// Passes on the result of a read or a write, or fails after [`STALLED`] without one.
    fn unless_stalled<T>(
        &mut self,
        cx: &mut Context<'_>,
        progress: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if progress.is_ready() {
            self.stalled = None;
            return progress;
        }
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(STALLED)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.tls).poll_read(cx, buffer);
        let has_read = buffer.filled().len() > before;
        if self.is_over(cx, has_read) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        self.unless_stalled(cx, read)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.tls).poll_write(cx, bytes);
        self.unless_stalled(cx, written)
    }

    /// The dispatcher flushes only when its own buffer is empty, so after [`Phase::Written`] a flush means
    /// that the whole response is sent.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.tls).poll_flush(cx);
        if matches!(flushed, Poll::Ready(Ok(()))) && self.handover.phase.get() == Phase::Written {
            if let Some(report) = self.handover.report.take() {
                report.complete();
            }
            self.handover.phase.set(Phase::Waiting);
            self.handover.admitted.slot().set_idle();
            // Also registers the wakers for the deadline and the eviction.
            if self.is_over(cx, false) {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        // A ready flush is not progress: it may have had nothing to send.
        if flushed.is_pending() { self.unless_stalled(cx, flushed) } else { flushed }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use openssl::ssl::{Ssl, SslContext, SslMethod};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::time::Instant;

    use super::*;
    use crate::api::admission::Admission;
    use crate::api::tls::{PairSource, Tls};

    #[actix::test]
    async fn a_stalled_connection_is_closed() {
        let directory = tempfile::tempdir().unwrap();
        let (tls, _) = Tls::open(PairSource::SelfSigned(directory.path().join("tls"))).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        let context = SslContext::builder(SslMethod::tls_client()).unwrap().build();
        let mut client = SslStream::new(Ssl::new(&context).unwrap(), client).unwrap();
        let accepting = Ssl::new(tls.acceptor().context()).unwrap();
        let mut server = SslStream::new(accepting, server).unwrap();
        let handshakes =
            tokio::join!(Pin::new(&mut server).accept(), Pin::new(&mut client).connect());
        assert!(matches!(handshakes, (Ok(()), Ok(()))), "{handshakes:?}");

        let admitted = Admission::new(1, 1).admit(None).unwrap();
        let mut connection = Connection::new(server, admitted);
        connection.handover.request_started();
        client.write_all(b"G").await.unwrap();
        assert_eq!(connection.read_u8().await.unwrap(), b'G');
        tokio::time::pause();
        let begun = Instant::now();
        let error = connection.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() >= STALLED);
    }
}
