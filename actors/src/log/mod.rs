//! A job's log: its events, the text in them, the writer, and the actor that owns the file.

pub mod buffer;
pub mod event;
pub mod index;
pub(crate) mod job_log;
pub mod text;
pub mod writer;
