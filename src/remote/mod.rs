//! The services that the agent talks to, and how they are reached.

pub mod callbacks;
pub mod http_client;
pub mod hub;
pub mod log_artifact;
pub mod log_server;
