//! A job's log: its events, the text in them, the one pen that writes them, and the actor that keeps them.

pub mod buffer;
pub mod event;
pub mod index;
pub mod text;
pub(crate) mod writer;
