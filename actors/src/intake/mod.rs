//! The sources of jobs: clients of the HTTPS API ([`http`]) and a control plane ([`poller`], with
//! its decisions in [`protocol`]).

mod attempts;
mod fetched;
pub mod http;
pub mod poller;
pub mod protocol;
