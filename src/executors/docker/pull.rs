//! Pulls the images of a job that the engine does not have, and reports the progress in a few lines.

use std::collections::HashMap;
use std::time::Duration;

use actors::retry::Retry;
use bollard::models::CreateImageInfo;
use bollard::query_parameters::CreateImageOptions;
use futures_util::StreamExt as _;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::Instant;

use super::engine::Engine;
use super::errors::RequestError;
use crate::executors::registries::Registries;

/// The pause between two progress lines of a pull.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// The attempts to pull an image; only transient errors are retried.
const PULLS: Retry = Retry::doubling(Duration::from_secs(1), Duration::from_secs(8), 5);

/// Pulls `image` unless the engine has it. Progress lines for the job's log go to `lines`.
pub async fn pull_unless_present(
    engine: &Engine,
    registries: &Registries,
    image: &str,
    lines: &UnboundedSender<String>,
) -> Result<(), RequestError> {
    // Fails if the job was stopped: the receiver is gone then.
    let report = |line: String| drop(lines.send(format!("{image}: {line}\n")));
    match engine.api.inspect_image(image).await.map_err(RequestError::from) {
        Ok(_) => {
            report("already present".into());
            return Ok(());
        }
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(error),
    }
    pull_with_retries(engine, registries, image, &report).await
}

async fn pull_with_retries(
    engine: &Engine,
    registries: &Registries,
    image: &str,
    report: &impl Fn(String),
) -> Result<(), RequestError> {
    let begun = Instant::now();
    let attempt = async || {
        report("pulling".into());
        pull(engine, registries, image, report).await
    };
    let failed = |error: &RequestError, _| report(format!("{error}; trying again"));
    let layers = PULLS.run(RequestError::is_transient, attempt, failed).await?;
    let seconds = begun.elapsed().as_secs();
    report(format!("pulled, {} in {seconds} s", layers.summary()));
    Ok(())
}

async fn pull(
    engine: &Engine,
    registries: &Registries,
    image: &str,
    report: &impl Fn(String),
) -> Result<Layers, RequestError> {
    let options = CreateImageOptions { from_image: Some(with_tag(image)), ..Default::default() };
    let credentials = registries.credentials_for(image).await;
    let mut progress = Box::pin(engine.api.create_image(Some(options), None, credentials));
    let mut layers = Layers::default();
    let begun = Instant::now();
    let mut last_reported = begun;
    while let Some(info) = progress.next().await {
        layers.update(&info?);
        if last_reported.elapsed() >= PROGRESS_INTERVAL {
            last_reported = Instant::now();
            report(format!("{}, {} s", layers.summary(), begun.elapsed().as_secs()));
        }
    }
    Ok(layers)
}

/// Adds `:latest` to a name without a tag or digest, as the engine would pull all tags otherwise.
fn with_tag(image: &str) -> String {
    let name = image.rsplit('/').next().unwrap_or(image);
    if name.contains([':', '@']) { image.to_owned() } else { format!("{image}:latest") }
}

/// The progress of a pull. Pure.
#[derive(Debug, Default)]
struct Layers {
    by_id: HashMap<String, Layer>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Layer {
    done: bool,
    downloaded_bytes: i64,
}

impl Layers {
    fn update(&mut self, info: &CreateImageInfo) {
        let (Some(id), Some(status)) = (&info.id, &info.status) else {
            return;
        };
        if status.starts_with("Pulling from") {
            return;
        }
        let layer = self.by_id.entry(id.clone()).or_default();
        match status.as_str() {
            "Downloading" => {
                let current = info.progress_detail.as_ref().and_then(|progress| progress.current);
                layer.downloaded_bytes =
                    current.unwrap_or(layer.downloaded_bytes).max(layer.downloaded_bytes);
            }
            "Pull complete" | "Already exists" => layer.done = true,
            _ => {}
        }
    }

    fn summary(&self) -> String {
        if self.by_id.is_empty() {
            return "no new layers".to_owned();
        }
        let done = self.by_id.values().filter(|layer| layer.done).count();
        let bytes: i64 = self.by_id.values().map(|layer| layer.downloaded_bytes).sum();
        let (megabytes, tenths) = (bytes / 1_000_000, bytes / 100_000 % 10);
        format!("{done} of {} layers, {megabytes}.{tenths} MB", self.by_id.len())
    }
}

#[cfg(test)]
mod tests {
    use bollard::models::ProgressDetail;

    use super::*;

    fn info(id: &str, status: &str, current: Option<i64>) -> CreateImageInfo {
        let progress_detail = Some(ProgressDetail { current, total: None });
        let (id, status) = (Some(id.into()), Some(status.into()));
        CreateImageInfo { id, status, progress_detail, ..Default::default() }
    }

    #[test]
    fn progress_counts_layers_and_bytes() {
        let mut layers = Layers::default();
        assert_eq!(layers.summary(), "no new layers");
        for event in [
            info("latest", "Pulling from x/y", None),
            info("a", "Pulling fs layer", None),
            info("b", "Already exists", None),
            info("a", "Downloading", Some(1_500_000)),
            info("a", "Downloading", Some(2_500_000)),
            info("a", "Extracting", Some(1)),
        ] {
            layers.update(&event);
        }
        assert_eq!(layers.summary(), "1 of 2 layers, 2.5 MB");
        layers.update(&info("a", "Pull complete", None));
        assert_eq!(layers.summary(), "2 of 2 layers, 2.5 MB");
    }

    #[test]
    fn latest_is_the_default_tag() {
        assert_eq!(with_tag("localhost:5000/ruby"), "localhost:5000/ruby:latest");
        for tagged in ["ruby:3", "localhost:5000/ruby:3", "ruby@sha256:0"] {
            assert_eq!(with_tag(tagged), tagged);
        }
    }
}
