//! Jobs in containers, in every mode.

mod cleanup;
mod clone;
mod credentials;
mod death;
pub mod engine;
mod entrypoints;
mod examples;
mod files;
mod fixtures;
mod guard;
mod helpers;
mod images;
mod jobs;
mod login;
mod main_container;
mod memory;
mod modes;
mod newer_engines;
mod passwords;
mod shell;
mod side_containers;
mod socket;
mod surroundings;
mod variables;
