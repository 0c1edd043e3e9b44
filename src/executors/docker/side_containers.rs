//! Waits until side containers are of use, and tells what is wrong with those that are not.

use std::time::Duration;

use actors::ports::{StepError, StepLog};
use bollard::container::LogOutput;
use bollard::models::{ContainerInspectResponse, ContainerState, HealthStatusEnum};
use bollard::query_parameters::{InspectContainerOptions, LogsOptions};
use futures_util::StreamExt as _;
use tokio::time::{Instant, sleep};

use super::engine::Engine;

/// How long to wait for a container with a health check, and for one that has ports only.
const HEALTH_PATIENCE: Duration = Duration::from_mins(2);
const PORT_PATIENCE: Duration = Duration::from_secs(10);

/// How long to wait between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How many of the last lines of a container are shown, and how many bytes of them at most.
const LAST_LINES: &str = "20";
const MOST_SHOWN: usize = 8 << 10;

/// One that was started.
#[derive(Clone, Debug)]
pub struct SideContainer {
    /// For the others.
    pub name: String,
    /// For the engine.
    pub id: String,
}

/// Tries ports from inside the job's network.
#[expect(async_fn_in_trait, reason = "all of it is on one thread")]
pub trait PortProbe {
    /// Whether one of the ports of the host `name` accepts a connection.
    async fn accepts(&mut self, name: &str, ports: &[u16]) -> Result<bool, StepError>;
}

/// Waits for all of `containers`, for each as long as it may take. What does not come is told, and no
/// failure.
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
            match look_at(engine, &container, probe, begun.elapsed()).await? {
                Look::Wait => still.push(container),
                Look::Ready => {}
                Look::Problem(what) => {
                    let shown = last_lines(engine, &container.id).await;
                    log.print(&format!("Warning: {} {what}\n{shown}", container.name)).await?;
                }
            }
        }
        waiting = still;
        if !waiting.is_empty() {
            sleep(LOOK_AGAIN).await;
        }
    }
    Ok(())
}

enum Look {
    Ready,
    Wait,
    Problem(String),
}

async fn look_at(
    engine: &Engine,
    container: &SideContainer,
    probe: &mut impl PortProbe,
    waited: Duration,
) -> Result<Look, StepError> {
    let found = engine.api.inspect_container(&container.id, None::<InspectContainerOptions>).await;
    let found = match found {
        Ok(found) => found,
        Err(error) => return Ok(Look::Problem(format!("can't be looked at: {error}"))),
    };
    let ports = ports_of(&found);
    let state = found.state.unwrap_or_default();
    if state.running == Some(false) {
        let code = state.exit_code.unwrap_or_default();
        return Ok(Look::Problem(format!("has ended with exit code {code}; its last output:")));
    }
    Ok(match health_of(&state) {
        Some(HealthStatusEnum::HEALTHY) => Look::Ready,
        Some(HealthStatusEnum::UNHEALTHY) => {
            Look::Problem("is unhealthy, says its health check; its last output:".into())
        }
        Some(_) if waited < HEALTH_PATIENCE => Look::Wait,
        Some(_) => Look::Problem(format!(
            "is not healthy after {} s; its last output:",
            HEALTH_PATIENCE.as_secs()
        )),
        None if ports.is_empty() => Look::Ready,
        None if probe.accepts(&container.name, &ports).await? => Look::Ready,
        None if waited < PORT_PATIENCE => Look::Wait,
        None => Look::Problem(format!(
            "accepts no connection after {} s; its last output:",
            PORT_PATIENCE.as_secs()
        )),
    })
}

/// What its health check says, if there is one.
fn health_of(state: &ContainerState) -> Option<HealthStatusEnum> {
    let status = state.health.as_ref()?.status?;
    (!matches!(status, HealthStatusEnum::NONE | HealthStatusEnum::EMPTY)).then_some(status)
}

/// The TCP ports that its image, or who made it, says it serves.
fn ports_of(container: &ContainerInspectResponse) -> Vec<u16> {
    let exposed = container.config.as_ref().and_then(|config| config.exposed_ports.as_ref());
    let tcp = exposed.into_iter().flatten().filter_map(|port| match port.split_once('/') {
        Some((port, "tcp")) => port.parse().ok(),
        Some(_) => None,
        None => port.parse().ok(),
    });
    tcp.collect()
}

/// What it printed last, in whole lines.
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
    fn only_tcp_ports_are_tried() {
        let ports = ["8080/tcp", "53/udp", "9000", "x/tcp"].map(str::to_owned);
        let config = ContainerConfig { exposed_ports: Some(ports.into()), ..Default::default() };
        let container = ContainerInspectResponse { config: Some(config), ..Default::default() };
        assert_eq!(ports_of(&container), [8080, 9000]);
    }

    #[test]
    fn no_health_check_is_no_health() {
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
