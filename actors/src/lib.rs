//! The job supervisor: messages, decisions, actors, and the ports they need.
//!
//! ```text
//! HTTP routes ──▶ SubmitJob · ReadJobLog · RequestStop ──▶ HttpIntake ─┐
//! signals ──▶ Interrupt · LeaveSoon ──▶ SyncPoller ◀── HubApi          │
//!                                           └──────────────┬───────────┘
//!                                                          ▼
//! a job's source ──▶ StartJob · StopJob · GetStatus · GetLog · ReportTransfer ──▶ JobSupervisor
//!        ▲                                                         │  spawns, afresh for every job:
//!        └── JobFinished{id, outcome} (a Recipient) ◀──────────────┤
//!                                                                  │
//!              Prepare · Export · Inject · RunCommand              │
//!                               Abort · Discard ──▶ Executor ◀─────┤
//!        Append(event), awaited = back-pressure ──▶ LogBuffer ◀────┤ Seal before JobFinished
//! ReadFrom{line} → file and range; Follow waits for more ─▶ │      │
//!       AwaitShipped ──▶ LogShipper ── Follow ─────────────▶┘      │
//!                OpenAccess · CloseAccess ──▶ JumpPoint ◀──────────┤
//!                     Count · Time (lossy) ──▶ Metrics ◀───────────┘
//! ```
//!
//! This crate does no I/O of its own: its [`ports`] are implemented by the binary. Decisions
//! ([`job_lifecycle`], [`sync_protocol`], [`log_index`], [`terminal_text`]) are plain synchronous
//! types with property tests; actors perform the effects.

pub mod compose;
pub mod delivery;
pub mod executor;
pub mod finished_once;
pub mod http_intake;
pub mod job;
mod job_hooks;
pub mod job_lifecycle;
mod job_log;
pub mod job_request;
mod job_steps;
pub mod job_supervisor;
pub mod jump_point;
pub mod log_buffer;
pub mod log_event;
pub mod log_index;
mod log_shipper;
pub mod metrics;
pub mod ports;
pub mod pull_delivery;
pub mod push_delivery;
pub mod sync_poller;
pub mod sync_protocol;
pub mod terminal_text;
#[cfg(feature = "testing")]
pub mod testing;
