//! One TLS connection of the API: gives up on those with whom nothing moves any more, and knows when an
//! answer has been handed over to the last byte.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};
use tokio_openssl::SslStream;

use crate::http::transfer::TransferReport;

/// How long nothing may move in either direction. There is no limit for the whole of an answer.
const IDLE: Duration = Duration::from_mins(5);

/// A TLS connection.
pub(super) struct Connection {
    tls: SslStream<TcpStream>,
    handover: Rc<Handover>,
    idle: Option<Pin<Box<Sleep>>>,
}

/// What is to be told when all that was written so far is out. Dropped with the connection, which
/// tells that it broke.
#[derive(Default)]
pub(super) struct Handover(RefCell<Option<TransferReport>>);

impl Handover {
    /// The answer's last byte is on its way.
    pub(super) fn expect(&self, report: TransferReport) {
        self.0.replace(Some(report));
    }
}

impl Connection {
    /// A connection whose handshake is done.
    pub(super) fn new(tls: SslStream<TcpStream>) -> Self {
        Self { tls, handover: Rc::default(), idle: None }
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
        let read = Pin::new(&mut self.tls).poll_read(cx, buffer);
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
        if matches!(flushed, Poll::Ready(Ok(())))
            && let Some(report) = self.handover.0.take()
        {
            report.complete();
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
    use crate::tls::{PairSource, Tls};

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

        let mut connection = Connection::new(server);
        client.write_all(b"G").await.unwrap();
        assert_eq!(connection.read_u8().await.unwrap(), b'G');
        tokio::time::pause();
        let begun = Instant::now();
        let error = connection.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() >= IDLE);
    }
}
