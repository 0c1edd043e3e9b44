//! The agent's commands: the only places that start top-level actors.

pub mod run;
pub mod serve;
pub mod start;
pub mod version;
