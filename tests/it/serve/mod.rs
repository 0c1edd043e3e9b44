//! `agent serve`: jobs from a platform over HTTPS.

mod abuse;
mod api;
mod archive_timeout;
mod auth;
mod callbacks;
mod config;
mod deadlines;
mod docs;
mod garbage;
mod hook;
mod lifetime;
mod log;
pub mod login;
mod metrics;
mod numbers_of_elements;
mod own_certificate;
mod own_log;
mod own_log_floods;
mod refusals;
mod secrets;
mod ssh_keys_lifetime;
mod start;
mod stop;
mod tls;
