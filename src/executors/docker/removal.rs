//! Removes a job's containers and networks from an engine.

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

/// How long removing everything may take before what is left is reported.
pub(super) const PATIENCE: Duration = Duration::from_mins(1);

/// How long to wait between two looks at what is left.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

fn filters(id: &str) -> HashMap<String, Vec<String>> {
    HashMap::from([("label".to_owned(), vec![format!("{PLACE_LABEL}={id}")])])
}

/// Removes all that the place called `id` has on `engine`, and what appears there meanwhile.
pub(super) async fn remove_all(engine: &Engine, id: &str) -> Result<(), LeftBehind> {
    let give_up = Instant::now() + PATIENCE;
    let mut first = true;
    loop {
        let why = match timeout_at(give_up, remove_what_is_there(engine, id)).await {
            Ok(Ok(true)) => return Ok(()),
            // Once more, for what was made meanwhile.
            Ok(Ok(false)) if first => {
                first = false;
                continue;
            }
            Ok(Ok(false)) => "somebody else is removing them".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the engine takes too long".to_owned(),
        };
        if Instant::now() >= give_up {
            return Err(LeftBehind { what: format!("containers of {id}: {why}") });
        }
        sleep(LOOK_AGAIN).await;
    }
}

/// Whether nothing was there.
async fn remove_what_is_there(engine: &Engine, id: &str) -> Result<bool, Error> {
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
        disconnect_strangers(engine, network).await;
    }
    let failure = failure.or(first_failure(join_all(ids().map(|id| api.remove_network(id))).await));
    match failure {
        Some(error) => Err(error),
        None => Ok(containers.is_empty() && networks.is_empty()),
    }
}

/// Containers that the job has made itself may be in its network, and stay.
async fn disconnect_strangers(engine: &Engine, network: &str) {
    let Ok(found) = engine.api.inspect_network(network, None).await else {
        return;
    };
    for container in found.containers.unwrap_or_default().into_keys() {
        let request = NetworkDisconnectRequest { container, force: Some(true) };
        // One that has just gone is no failure.
        let _ = engine.api.disconnect_network(network, request).await;
    }
}

/// What is gone already, or is being removed, is no failure.
fn first_failure(results: Vec<Result<(), Error>>) -> Option<Error> {
    results.into_iter().filter_map(Result::err).find(|error| {
        !matches!(error, Error::DockerResponseServerError { status_code: 404 | 409, .. })
    })
}
