//! Thin adapters to the operating system; all unsafe code is in `sys`.

pub mod cgroup;
pub mod open_files;
pub mod processes;
pub mod programs;
pub mod pty;
pub mod random;
pub mod shell_words;
pub(crate) mod sys;
