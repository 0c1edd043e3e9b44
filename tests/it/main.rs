//! The real binary against real things.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a failed test is a panic")]
#![expect(unreachable_pub, reason = "modules of a test are one program")]

mod bad_input;
mod clone_over_ssh;
mod containment;
mod example_jobs;
mod hosted_abuse;
mod hosted_api;
mod hosted_auth;
mod hosted_callbacks;
mod hosted_config;
mod hosted_docs;
mod hosted_garbage;
mod hosted_hook;
mod hosted_lifetime;
mod hosted_log;
mod hosted_login;
mod hosted_metrics;
mod hosted_own_log;
mod hosted_refusals;
mod hosted_secrets;
mod hosted_start;
mod hosted_stop;
mod hosted_tls;
mod job_bytes;
mod output;
mod shell_session;
mod start_config;
mod start_daemons;
mod start_faults;
mod start_hooks;
mod start_jobs;
mod start_signals;
mod start_tls;
mod stopping;
mod support;
