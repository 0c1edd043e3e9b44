//! The self-hosted mode on paused time: the poller, the supervisor and the delivery of logs together,
//! between a scripted control plane, a scripted log server and a scripted shell.
#![expect(
    clippy::panic,
    clippy::unchecked_time_subtraction,
    clippy::unwrap_used,
    reason = "a failed test is a panic"
)]

mod conversation;
mod crashes;
mod delivery;
mod giving_up;
mod leaving;
mod outages;
mod reporting;
mod support;
