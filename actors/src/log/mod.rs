//! A job's log: its events, the text in them, the writer, and the actor that owns the file.

pub mod buffer;
pub mod event;
pub mod index;
pub mod text;
pub(crate) mod writer;
