//! Where jobs come from.

pub mod http;
pub mod poller;
pub mod protocol;
