//! Removes a job's containers and networks from an engine.
//!
//! They are found by their label [`PLACE_LABEL`], so the agent and the guard need no list of them.

use std::collections::HashMap;
use std::time::Duration;

use actors::ports::LeftBehind;
use bollard::errors::Error;
use bollard::models::NetworkDisconnectRequest;
use bollard::query_parameters::{
    ListContainersOptions, ListNetworksOptions, RemoveContainerOptions,
};
use futures_util::future::join_all;
use tokio::time::{Instant, sleep, timeout_at};

use super::bodies::PLACE_LABEL;
use super::engine::Engine;

/// How long removing everything may take before the rest is reported as left behind.
pub(super) const PATIENCE: Duration = Duration::from_mins(1);

/// The pause between two attempts to remove what is left.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

fn filters(id: &str) -> HashMap<String, Vec<String>> {
    HashMap::from([("label".to_owned(), vec![format!("{PLACE_LABEL}={id}")])])
}

/// Removes all containers and networks of the place `id` from `engine`, also those that are created
/// meanwhile.
pub(super) async fn remove_all(engine: &Engine, id: &str) -> Result<(), LeftBehind> {
    let give_up = Instant::now() + PATIENCE;
    let mut first = true;
    loop {
        let why = match timeout_at(give_up, remove_listed(engine, id)).await {
            Ok(Ok(true)) => return Ok(()),
            // List once more: something may have been created since.
            Ok(Ok(false)) if first => {
                first = false;
                continue;
            }
            Ok(Ok(false)) => "they are already being removed, but still exist".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the engine did not respond in time".to_owned(),
        };
        if Instant::now() >= give_up {
            return Err(LeftBehind { what: format!("containers of {id}: {why}") });
        }
        sleep(RETRY_PAUSE).await;
    }
}

/// Lists and removes the place's containers and networks once. Returns whether there were none.
async fn remove_listed(engine: &Engine, id: &str) -> Result<bool, Error> {
    let api = &engine.api;
    let all = ListContainersOptions { all: true, filters: Some(filters(id)), ..Default::default() };
    let containers = api.list_containers(Some(all)).await?;
    let removed = containers.iter().filter_map(|container| container.id.as_deref()).map(|id| {
        let options = RemoveContainerOptions { force: true, v: true, ..Default::default() };
        api.remove_container(id, Some(options))
    });
    let failure = first_failure(join_all(removed).await);
    let networks =
        api.list_networks(Some(ListNetworksOptions { filters: Some(filters(id)) })).await?;
    let ids = || networks.iter().filter_map(|network| network.id.as_deref());
    for network in ids() {
        disconnect_all(engine, network).await;
    }
    let failure = failure.or(first_failure(join_all(ids().map(|id| api.remove_network(id))).await));
    match failure {
        Some(error) => Err(error),
        None => Ok(containers.is_empty() && networks.is_empty()),
    }
}

/// Disconnects all containers from `network`, so that it can be removed. Containers that the job created
/// itself may be connected to it; they are not removed.
async fn disconnect_all(engine: &Engine, network: &str) {
    let Ok(found) = engine.api.inspect_network(network, None).await else {
        return;
    };
    for container in found.containers.unwrap_or_default().into_keys() {
        let request = NetworkDisconnectRequest { container, force: Some(true) };
        // Fails if the container has just been removed.
        let _ = engine.api.disconnect_network(network, request).await;
    }
}

/// Returns the first error other than 404 (already removed) and 409 (being removed).
fn first_failure(results: Vec<Result<(), Error>>) -> Option<Error> {
    results.into_iter().filter_map(Result::err).find(|error| {
        !matches!(error, Error::DockerResponseServerError { status_code: 404 | 409, .. })
    })
}
