//! Answers that come from a file: sent chunk by chunk as the client takes them.

use std::io::{self, Write as _};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use actix::Addr;
use actix_web::body::{BodySize, BoxBody, MessageBody};
use actors::delivery::pull::Transfer;
use actors::intake::http::HttpIntake;
use actors::job::JobId;
use actors::ports::LogSource;
use actors::supervisor::ReportTransfer;
use bytes::{Bytes, BytesMut};
use flate2::Compression;
use flate2::write::GzEncoder;

use crate::api::connection::Handover;

/// How much of a file is read at once.
const CHUNK: u64 = 128 * 1024;

/// Tells how an archivator's transfer went: broken, unless it is completed.
pub(super) struct TransferReport {
    intake: Addr<HttpIntake>,
    id: JobId,
    end: Transfer,
}

impl TransferReport {
    /// A transfer of the log of `id` begins.
    pub(super) fn begin(intake: Addr<HttpIntake>, id: JobId) -> Self {
        intake.do_send(ReportTransfer { id: id.clone(), transfer: Transfer::Began });
        Self { intake, id, end: Transfer::Broken }
    }

    /// Every byte was handed to the connection.
    pub(super) fn complete(mut self) {
        self.end = Transfer::Completed;
    }
}

impl Drop for TransferReport {
    fn drop(&mut self) {
        self.intake.do_send(ReportTransfer { id: self.id.clone(), transfer: self.end });
    }
}

/// The body of any answer: its end is that of the answer.
pub(super) struct AnswerBody {
    pub(super) body: BoxBody,
    pub(super) handover: Rc<Handover>,
}

impl MessageBody for AnswerBody {
    type Error = Box<dyn std::error::Error>;

    fn size(&self) -> BodySize {
        self.body.size()
    }

    fn poll_next(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, Self::Error>>> {
        Pin::new(&mut self.body).poll_next(cx)
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        self.handover.answer_ends();
    }
}

/// A part of a file as the body of an answer. The file is held open: whatever becomes of its name, a
/// slow client gets everything.
pub(super) struct FileBody {
    source: Arc<dyn LogSource>,
    at: u64,
    end: u64,
    gzip: Option<GzEncoder<Vec<u8>>>,
    /// Compressing takes long; others have had their turn since the last time.
    rested: bool,
    /// To be told at its end, and through which connection's handover.
    report: Option<(TransferReport, Rc<Handover>)>,
}

impl FileBody {
    /// The bytes of `source` from `start` to `end`.
    pub(super) fn new(source: Arc<dyn LogSource>, start: u64, end: u64) -> Self {
        Self { source, at: start, end, gzip: None, rested: false, report: None }
    }

    /// The same, compressed: fast rather than small.
    #[must_use]
    pub(super) fn compressed(mut self) -> Self {
        self.gzip = Some(GzEncoder::new(Vec::new(), Compression::fast()));
        self
    }

    /// The same, and `report` is completed when it is sent.
    #[must_use]
    pub(super) fn reported(mut self, report: TransferReport, handover: Rc<Handover>) -> Self {
        if self.size() == BodySize::Sized(0) {
            // Nobody asks an empty body for its bytes: its end is the end of the headers.
            handover.expect(report);
        } else {
            self.report = Some((report, handover));
        }
        self
    }

    /// The next bytes to send, which may be none yet; nothing at the end.
    fn next_chunk(&mut self) -> io::Result<Option<Bytes>> {
        if self.at == self.end {
            return Ok(match self.gzip.take() {
                Some(gzip) => Some(gzip.finish()?.into()),
                None => None,
            });
        }
        let wanted = usize::try_from(CHUNK.min(self.end - self.at)).map_err(io::Error::other)?;
        let mut chunk = BytesMut::zeroed(wanted);
        // Inline: it was written a moment ago, so it is in memory.
        let read = self.source.read_at(self.at, &mut chunk)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        chunk.truncate(read);
        self.at += read as u64;
        let Some(gzip) = &mut self.gzip else {
            return Ok(Some(chunk.freeze()));
        };
        gzip.write_all(&chunk)?;
        Ok(Some(std::mem::take(gzip.get_mut()).into()))
    }
}

impl MessageBody for FileBody {
    type Error = io::Error;

    fn size(&self) -> BodySize {
        match self.gzip {
            Some(_) => BodySize::Stream,
            None => BodySize::Sized(self.end - self.at),
        }
    }

    fn poll_next(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, io::Error>>> {
        let body = self.get_mut();
        if body.gzip.is_some() {
            body.rested = !body.rested;
            if body.rested {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
        let chunk = body.next_chunk();
        if matches!(&chunk, Ok(Some(bytes)) if bytes.is_empty()) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if matches!(chunk, Ok(None))
            && let Some((report, handover)) = body.report.take()
        {
            handover.expect(report);
        }
        Poll::Ready(chunk.transpose())
    }
}
