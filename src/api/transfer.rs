//! Response bodies that are read from a file, chunk by chunk, as the client takes them.

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

/// How much of a file is read at once, in bytes.
const CHUNK: u64 = 128 * 1024;

/// Reports an archivator's transfer to the intake: as broken, unless [`Self::complete`] is called.
pub(super) struct TransferReport {
    intake: Addr<HttpIntake>,
    id: JobId,
    end: Transfer,
}

impl TransferReport {
    /// Reports that a transfer of the log of job `id` has begun.
    pub(super) fn begin(intake: Addr<HttpIntake>, id: JobId) -> Self {
        intake.do_send(ReportTransfer { id: id.clone(), transfer: Transfer::Began });
        Self { intake, id, end: Transfer::Broken }
    }

    /// Reports that every byte was sent.
    pub(super) fn complete(mut self) {
        self.end = Transfer::Completed;
    }
}

impl Drop for TransferReport {
    fn drop(&mut self) {
        self.intake.do_send(ReportTransfer { id: self.id.clone(), transfer: self.end });
    }
}

/// Wraps the body of a response, and tells the connection when it is written.
pub(super) struct TrackedBody {
    pub(super) body: BoxBody,
    pub(super) handover: Rc<Handover>,
}

impl MessageBody for TrackedBody {
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

impl Drop for TrackedBody {
    fn drop(&mut self) {
        self.handover.response_written();
    }
}

/// A part of a file as the body of a response. The open file survives its removal, so slow clients get
/// everything.
pub(super) struct FileBody {
    source: Arc<dyn LogSource>,
    at: u64,
    end: u64,
    gzip: Option<GzEncoder<Vec<u8>>>,
    /// Whether the body has yielded to other connections since its last chunk. Compressing is slow.
    has_yielded: bool,
    /// Completed after the last chunk, when the connection of this [`Handover`] has sent it.
    report: Option<(TransferReport, Rc<Handover>)>,
}

impl FileBody {
    /// Sends the bytes of `source` from `start` to `end`.
    pub(super) fn new(source: Arc<dyn LogSource>, start: u64, end: u64) -> Self {
        Self { source, at: start, end, gzip: None, has_yielded: false, report: None }
    }

    /// Compresses the body with gzip, fast rather than small.
    #[must_use]
    pub(super) fn compressed(mut self) -> Self {
        self.gzip = Some(GzEncoder::new(Vec::new(), Compression::fast()));
        self
    }

    /// Completes `report` when the whole body is sent.
    #[must_use]
    pub(super) fn reported(mut self, report: TransferReport, handover: Rc<Handover>) -> Self {
        if self.size() == BodySize::Sized(0) {
            // An empty body is never polled: the response ends with its headers.
            handover.complete_when_flushed(report);
        } else {
            self.report = Some((report, handover));
        }
        self
    }

    /// Returns the next bytes, or `None` at the end. The bytes are empty while the compressor holds its
    /// output back.
    fn next_chunk(&mut self) -> io::Result<Option<Bytes>> {
        if self.at == self.end {
            return Ok(match self.gzip.take() {
                Some(gzip) => Some(gzip.finish()?.into()),
                None => None,
            });
        }
        let wanted = usize::try_from(CHUNK.min(self.end - self.at)).map_err(io::Error::other)?;
        let mut chunk = BytesMut::zeroed(wanted);
        // Reads on this thread: what was written a moment ago is in the page cache.
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
            body.has_yielded = !body.has_yielded;
            if body.has_yielded {
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
            handover.complete_when_flushed(report);
        }
        Poll::Ready(chunk.transpose())
    }
}
