//! `agent start`: jobs that the agent fetches from a control plane.

mod answers;
mod closed_connections;
mod config;
mod daemons;
mod delivery;
mod environment;
mod faults;
mod fetching;
mod hooks;
mod jobs;
mod names;
mod operator_settings;
mod refusals;
mod secrets_by_descriptor;
mod signals;
mod tls;
