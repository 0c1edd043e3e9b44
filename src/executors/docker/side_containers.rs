//! Waits until side containers are ready, and warns about those that are not.

use std::time::Duration;

use actors::ports::{StepError, StepLog};
use bollard::container::LogOutput;
use bollard::models::{ContainerInspectResponse, ContainerState, HealthStatusEnum};
use bollard::query_parameters::{InspectContainerOptions, LogsOptions};
use futures_util::StreamExt as _;
use tokio::time::{Instant, sleep};

use super::engine::Engine;

/// How long to wait for a container with a health check.
const HEALTH_PATIENCE: Duration = Duration::from_mins(2);

/// How long to wait for a container without a health check to accept a connection.
const PORT_PATIENCE: Duration = Duration::from_secs(10);

/// The pause between two checks of the containers.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// How much of a container's output a warning shows: the number of lines, and their size in bytes.
const LAST_LINES: &str = "20";
const MOST_SHOWN: usize = 8 << 10;

/// A side container that was started.
#[derive(Clone, Debug)]
pub struct SideContainer {
    /// Its host name in the job's network.
    pub name: String,
    /// Its id on the engine.
    pub id: String,
}

/// Tries ports from inside the job's network.
#[expect(async_fn_in_trait, reason = "all of it is on one thread")]
pub trait PortProbe {
    /// Returns whether one of the `ports` of the host `name` accepts a connection.
    async fn accepts(&mut self, name: &str, ports: &[u16]) -> Result<bool, StepError>;
}

/// Waits until each of `containers` is ready or its time is up. A container that does not become ready is
/// reported as a warning in `log`, and does not fail the job.
pub async fn wait_for_all(
    engine: &Engine,
    containers: Vec<SideContainer>,
    probe: &mut impl PortProbe,
    log: &dyn StepLog,
) -> Result<(), StepError> {
    let begun = Instant::now();
    let mut waiting = containers;
    while !waiting.is_empty() {
        let mut still = Vec::new();
        for container in waiting {
            match check(engine, &container, probe, begun.elapsed()).await? {
                Readiness::Wait => still.push(container),
                Readiness::Ready => {}
                Readiness::Problem(what) => {
                    let shown = last_lines(engine, &container.id).await;
                    log.print(&format!("Warning: {} {what}\n{shown}", container.name)).await?;
                }
            }
        }
        waiting = still;
        if !waiting.is_empty() {
            sleep(CHECK_INTERVAL).await;
        }
    }
    Ok(())
}

enum Readiness {
    Ready,
    Wait,
    Problem(String),
}

async fn check(
    engine: &Engine,
    container: &SideContainer,
    probe: &mut impl PortProbe,
    waited: Duration,
) -> Result<Readiness, StepError> {
    let found = engine.api.inspect_container(&container.id, None::<InspectContainerOptions>).await;
    let found = match found {
        Ok(found) => found,
        Err(error) => return Ok(Readiness::Problem(format!("can't be inspected: {error}"))),
    };
    let ports = ports_of(&found);
    let state = found.state.unwrap_or_default();
    if state.running == Some(false) {
        let code = state.exit_code.unwrap_or_default();
        return Ok(Readiness::Problem(format!(
            "has ended with exit code {code}; its last output:"
        )));
    }
    Ok(match health_of(&state) {
        Some(HealthStatusEnum::HEALTHY) => Readiness::Ready,
        Some(HealthStatusEnum::UNHEALTHY) => Readiness::Problem(
            "is unhealthy according to its health check; its last output:".into(),
        ),
        Some(_) if waited < HEALTH_PATIENCE => Readiness::Wait,
        Some(_) => Readiness::Problem(format!(
            "is not healthy after {} s; its last output:",
            HEALTH_PATIENCE.as_secs()
        )),
        None if ports.is_empty() => Readiness::Ready,
        None if probe.accepts(&container.name, &ports).await? => Readiness::Ready,
        None if waited < PORT_PATIENCE => Readiness::Wait,
        None => Readiness::Problem(format!(
            "accepts no connection after {} s; its last output:",
            PORT_PATIENCE.as_secs()
        )),
    })
}

/// Returns the state of the container's health check; `None` if it has none.
fn health_of(state: &ContainerState) -> Option<HealthStatusEnum> {
    let status = state.health.as_ref()?.status?;
    (!matches!(status, HealthStatusEnum::NONE | HealthStatusEnum::EMPTY)).then_some(status)
}

/// Returns the TCP ports that the container exposes.
fn ports_of(container: &ContainerInspectResponse) -> Vec<u16> {
    let exposed = container.config.as_ref().and_then(|config| config.exposed_ports.as_ref());
    let tcp = exposed.into_iter().flatten().filter_map(|port| match port.split_once('/') {
        Some((port, "tcp")) => port.parse().ok(),
        Some(_) => None,
        None => port.parse().ok(),
    });
    tcp.collect()
}

/// Returns the container's last output, indented.
async fn last_lines(engine: &Engine, id: &str) -> String {
    let options = LogsOptions {
        stdout: true,
        stderr: true,
        tail: LAST_LINES.to_owned(),
        ..Default::default()
    };
    let mut parts = Box::pin(engine.api.logs(id, Some(options)));
    let mut printed = Vec::new();
    while let Some(Ok(part)) = parts.next().await {
        let (LogOutput::StdOut { message }
        | LogOutput::StdErr { message }
        | LogOutput::Console { message }
        | LogOutput::StdIn { message }) = part;
        printed.extend_from_slice(&message);
        if printed.len() > MOST_SHOWN {
            printed.truncate(MOST_SHOWN);
            break;
        }
    }
    let text = String::from_utf8_lossy(&printed);
    text.lines().map(|line| format!("  {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use bollard::models::{ContainerConfig, Health};

    use super::*;

    #[test]
    fn only_tcp_ports_are_probed() {
        let ports = ["8080/tcp", "53/udp", "9000", "x/tcp"].map(str::to_owned);
        let config = ContainerConfig { exposed_ports: Some(ports.into()), ..Default::default() };
        let container = ContainerInspectResponse { config: Some(config), ..Default::default() };
        assert_eq!(ports_of(&container), [8080, 9000]);
    }

    #[test]
    fn a_container_without_a_health_check_has_no_health() {
        let state = |status| ContainerState {
            health: Some(Health { status: Some(status), ..Default::default() }),
            ..Default::default()
        };
        assert_eq!(health_of(&state(HealthStatusEnum::NONE)), None);
        let starting = health_of(&state(HealthStatusEnum::STARTING));
        assert_eq!(starting, Some(HealthStatusEnum::STARTING));
        assert_eq!(health_of(&ContainerState::default()), None);
    }
}
