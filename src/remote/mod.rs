//! HTTP clients of the platform, the control plane and the log servers.

pub mod callbacks;
pub mod http_client;
pub mod hub;
pub mod log_artifact;
pub mod log_server;
