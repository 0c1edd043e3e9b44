//! The job supervisor: its messages, decisions and actors, and the ports that these need.
//!
//! ```text
//! HTTP routes ──▶ SubmitJob · ReadJobLog · RequestStop ──▶ HttpIntake ─┐
//! signals ──▶ Interrupt · LeaveSoon ──▶ SyncPoller ◀── HubApi          │
//!                                           └──────────────┬───────────┘
//!                                                          ▼
//! an intake ──▶ StartJob · StopJob · GetActiveJob · GetLog · ReportTransfer ──▶ JobSupervisor
//!        ▲                                                         │  spawns anew for each job:
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
//! These are the main messages; docs/architecture.md lists all of them.
//!
//! This crate does no I/O: the binary implements its [`ports`]. Decisions ([`job::lifecycle`],
//! [`intake::protocol`], [`log::index`], [`log::text`]) are plain synchronous types with property
//! tests; the actors perform the effects.

pub mod delivery;
pub mod errors;
pub mod intake;
pub mod job;
pub mod log;
pub mod metrics;
pub mod ports;
pub mod request;
pub mod retry;
pub mod ssh_access;
pub mod supervisor;
#[cfg(feature = "testing")]
pub mod testing;
