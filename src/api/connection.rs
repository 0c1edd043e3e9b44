//! One TLS connection of the API: gives up on those with whom nothing moves any more, and knows when an
//! answer has been handed over to the last byte.

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

/// How long nothing may move in either direction. There is no limit for the whole of an answer.
const IDLE: Duration = Duration::from_mins(5);

/// How long the headers of a request may take, from their first byte on. What comes of a request that was answered
/// already counts as such.
const HEADERS: Duration = Duration::from_secs(12);

/// A TLS connection.
pub(super) struct Connection {
    tls: SslStream<TcpStream>,
    handover: Rc<Handover>,
    idle: Option<Pin<Box<Sleep>>>,
    /// The number of the request whose headers have begun, and when they must be there.
    headers_due: Option<(u64, Pin<Box<Sleep>>)>,
    evicted: Pin<Box<WaitForCancellationFutureOwned>>,
}

/// What the connection and the request that is handled on it know of each other.
pub(super) struct Handover {
    /// To be told when all that was written so far is out. Dropped with the connection, which tells that it broke.
    report: RefCell<Option<TransferReport>>,
    phase: Cell<Phase>,
    /// No other request may come after this one.
    is_last: Cell<bool>,
    /// How many requests have begun.
    requests: Cell<u64>,
    admitted: Admitted,
}

/// Where the connection is between two requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The next request has not been read whole, or not begun.
    Waiting,
    /// It is handled, or its answer is not written to the end.
    Handling,
    /// Its answer is written, and on its way.
    Answered,
}

impl Handover {
    /// The answer's last byte is on its way.
    pub(super) fn expect(&self, report: TransferReport) {
        self.report.replace(Some(report));
    }

    /// The headers of a request are there.
    pub(super) fn request_begins(&self) {
        self.phase.set(Phase::Handling);
        self.requests.update(|requests| requests + 1);
        self.admitted.place().set_busy();
    }

    /// The connection is closed after the answer, whatever still comes.
    pub(super) fn close_after_answer(&self) {
        self.is_last.set(true);
    }

    /// The answer is written to its end.
    pub(super) fn answer_ends(&self) {
        self.phase.set(Phase::Answered);
    }
}

impl Connection {
    /// A connection whose handshake is done.
    pub(super) fn new(tls: SslStream<TcpStream>, admitted: Admitted) -> Self {
        let evicted = Box::pin(admitted.place().eviction().cancelled_owned());
        let handover = Handover {
            report: RefCell::default(),
            phase: Cell::new(Phase::Waiting),
            is_last: Cell::new(false),
            requests: Cell::new(0),
            admitted,
        };
        Self { tls, handover: Rc::new(handover), idle: None, headers_due: None, evicted }
    }

    /// Whether the connection is to be given up: it has to go, or headers have begun and do not come to their end.
    fn is_over(&mut self, cx: &mut Context<'_>, has_read: bool) -> bool {
        let request = self.handover.requests.get();
        self.headers_due.take_if(|(of, _)| *of != request);
        if self.handover.phase.get() != Phase::Waiting {
            return false;
        }
        let patience = if self.handover.is_last.get() { LINGER } else { HEADERS };
        if self.headers_due.is_none() && (has_read || self.handover.is_last.get()) {
            self.headers_due = Some((request, Box::pin(sleep(patience))));
        }
        let due = self.headers_due.as_mut();
        let is_late = due.is_some_and(|(_, due)| due.as_mut().poll(cx).is_ready());
        is_late || self.evicted.as_mut().poll(cx).is_ready()
    }

    /// What it has to hand over.
    pub(super) fn handover(&self) -> Rc<Handover> {
        Rc::clone(&self.handover)
    }

    /// Passes on what became of a read or a write, or an error if nothing has moved for too long.
    fn unless_idle<T>(
        &mut self,
        cx: &mut Context<'_>,
        moved: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if moved.is_ready() {
            self.idle = None;
            return moved;
        }
        let idle = self.idle.get_or_insert_with(|| Box::pin(sleep(IDLE)));
        ready!(idle.as_mut().poll(cx));
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
        self.unless_idle(cx, read)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.tls).poll_write(cx, bytes);
        self.unless_idle(cx, written)
    }

    /// The dispatcher flushes only when its own buffer is empty.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.tls).poll_flush(cx);
        if matches!(flushed, Poll::Ready(Ok(()))) && self.handover.phase.get() == Phase::Answered {
            if let Some(report) = self.handover.report.take() {
                report.complete();
            }
            self.handover.phase.set(Phase::Waiting);
            self.handover.admitted.place().set_idle();
            // Has this task come back when the time of who should go is over.
            if self.is_over(cx, false) {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        // A flush with nothing to send moves nothing.
        if flushed.is_pending() { self.unless_idle(cx, flushed) } else { flushed }
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
    async fn a_connection_on_which_nothing_moves_is_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let (tls, _) = Tls::open(PairSource::OwnIn(directory.path().join("tls"))).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        let context = SslContext::builder(SslMethod::tls_client()).unwrap().build();
        let mut client = SslStream::new(Ssl::new(&context).unwrap(), client).unwrap();
        let accepting = Ssl::new(tls.acceptor().context()).unwrap();
        let mut server = SslStream::new(accepting, server).unwrap();
        let hands = tokio::join!(Pin::new(&mut server).accept(), Pin::new(&mut client).connect());
        assert!(matches!(hands, (Ok(()), Ok(()))), "{hands:?}");

        let admitted = Admission::new(1, 1).admit(None).unwrap();
        let mut connection = Connection::new(server, admitted);
        connection.handover.request_begins();
        client.write_all(b"G").await.unwrap();
        assert_eq!(connection.read_u8().await.unwrap(), b'G');
        tokio::time::pause();
        let begun = Instant::now();
        let error = connection.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() >= IDLE);
    }
}
