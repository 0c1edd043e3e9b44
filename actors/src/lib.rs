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
//! ([`job::lifecycle`], [`intake::protocol`], [`log::index`], [`log::text`]) are plain synchronous
//! types with property tests; actors perform the effects.

pub mod delivery;
pub mod intake;
pub mod job;
pub mod log;
pub mod metrics;
pub mod ports;
pub mod request;
pub mod ssh_access;
pub mod supervisor;
#[cfg(feature = "testing")]
pub mod testing;
