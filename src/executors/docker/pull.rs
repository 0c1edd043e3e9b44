//! Gets the images of a job that are not there yet, and tells how that goes in a few lines.

use std::collections::HashMap;
use std::time::Duration;

use actors::retry::Retry;
use bollard::errors::Error;
use bollard::models::CreateImageInfo;
use bollard::query_parameters::CreateImageOptions;
use futures_util::StreamExt as _;
use tokio::sync::mpsc::UnboundedSender;
use tokio::time::Instant;

use super::engine::Engine;
use crate::executors::registries::Registries;

/// How often to tell how far a pull is.
const TELL: Duration = Duration::from_secs(5);

/// The attempts to pull an image, as long as they fail for transient reasons.
const PULLS: Retry = Retry::doubling(Duration::from_secs(1), Duration::from_secs(8), 5);

/// Words of registries and engines that mean a transient failure: the engine tells no more than words.
const TRANSIENT: [&str; 10] = [
    "timeout",
    "timed out",
    "connection refused",
    "connection reset",
    "no such host",
    "temporary failure",
    "unexpected eof",
    ": eof",
    "service unavailable",
    "bad gateway",
];

/// Sees to it that the engine has `image`, which may take long. Lines for people go to `told`.
pub async fn ensure_image(
    engine: &Engine,
    registries: &Registries,
    image: &str,
    told: &UnboundedSender<String>,
) -> Result<(), Error> {
    // Nobody listens any more if the job was stopped.
    let tell = |line: String| drop(told.send(format!("{image}: {line}\n")));
    match engine.api.inspect_image(image).await {
        Ok(_) => {
            tell("is here".into());
            return Ok(());
        }
        Err(Error::DockerResponseServerError { status_code: 404, .. }) => {}
        Err(error) => return Err(error),
    }
    let begun = Instant::now();
    let attempt = async || {
        tell("pulling".into());
        pull(engine, registries, image, &tell).await
    };
    let failed = |error: &Error, _| tell(format!("{}; trying again", words_of(error)));
    let layers = PULLS.run(is_transient, attempt, failed).await?;
    let seconds = begun.elapsed().as_secs();
    tell(format!("pulled, {} in {seconds} s", layers.shown()));
    Ok(())
}

async fn pull(
    engine: &Engine,
    registries: &Registries,
    image: &str,
    tell: &impl Fn(String),
) -> Result<Layers, Error> {
    let options = CreateImageOptions { from_image: Some(with_tag(image)), ..Default::default() };
    let credentials = registries.credentials_for(image).await;
    let mut progress = Box::pin(engine.api.create_image(Some(options), None, credentials));
    let mut layers = Layers::default();
    let begun = Instant::now();
    let mut last_told = begun;
    while let Some(info) = progress.next().await {
        layers.note(&info?);
        if last_told.elapsed() >= TELL {
            last_told = Instant::now();
            tell(format!("{}, {} s", layers.shown(), begun.elapsed().as_secs()));
        }
    }
    Ok(layers)
}

/// Without a tag the engine would pull them all.
fn with_tag(image: &str) -> String {
    let name = image.rsplit('/').next().unwrap_or(image);
    if name.contains([':', '@']) { image.to_owned() } else { format!("{image}:latest") }
}

fn is_transient(error: &Error) -> bool {
    let words = words_of(error).to_ascii_lowercase();
    TRANSIENT.iter().any(|transient| words.contains(transient))
}

/// The engine's own words.
pub fn words_of(error: &Error) -> String {
    match error {
        Error::DockerResponseServerError { message, .. } => message.trim().to_owned(),
        Error::DockerStreamError { error } => error.trim().to_owned(),
        other => other.to_string(),
    }
}

/// How far a pull is. Pure.
#[derive(Debug, Default)]
struct Layers {
    by_id: HashMap<String, Layer>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Layer {
    done: bool,
    /// In bytes, of what is downloaded.
    got: i64,
}

impl Layers {
    fn note(&mut self, info: &CreateImageInfo) {
        let (Some(id), Some(status)) = (&info.id, &info.status) else {
            return;
        };
        if status.starts_with("Pulling from") {
            return;
        }
        let layer = self.by_id.entry(id.clone()).or_default();
        match status.as_str() {
            "Downloading" => {
                let got = info.progress_detail.as_ref().and_then(|progress| progress.current);
                layer.got = got.unwrap_or(layer.got).max(layer.got);
            }
            "Pull complete" | "Already exists" => layer.done = true,
            _ => {}
        }
    }

    fn shown(&self) -> String {
        if self.by_id.is_empty() {
            return "no layer is missing".to_owned();
        }
        let done = self.by_id.values().filter(|layer| layer.done).count();
        let bytes: i64 = self.by_id.values().map(|layer| layer.got).sum();
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
    fn progress_is_layers_and_bytes() {
        let mut layers = Layers::default();
        assert_eq!(layers.shown(), "no layer is missing");
        for seen in [
            info("latest", "Pulling from x/y", None),
            info("a", "Pulling fs layer", None),
            info("b", "Already exists", None),
            info("a", "Downloading", Some(1_500_000)),
            info("a", "Downloading", Some(2_500_000)),
            info("a", "Extracting", Some(1)),
        ] {
            layers.note(&seen);
        }
        assert_eq!(layers.shown(), "1 of 2 layers, 2.5 MB");
        layers.note(&info("a", "Pull complete", None));
        assert_eq!(layers.shown(), "2 of 2 layers, 2.5 MB");
    }

    #[test]
    fn an_image_without_a_tag_is_the_latest() {
        assert_eq!(with_tag("localhost:5000/ruby"), "localhost:5000/ruby:latest");
        for tagged in ["ruby:3", "localhost:5000/ruby:3", "ruby@sha256:0"] {
            assert_eq!(with_tag(tagged), tagged);
        }
    }

    #[test]
    fn refusals_are_final_and_failed_connections_are_not() {
        let error = |message: &str| Error::DockerResponseServerError {
            status_code: 500,
            message: message.to_owned(),
        };
        assert!(is_transient(&error(
            "Get \"https://r/v2/\": dial tcp: connect: connection refused"
        )));
        assert!(is_transient(&error("Get \"https://r/v2/\": EOF")));
        for refusal in [
            "unauthorized: authentication required",
            "manifest for x:latest not found: manifest unknown",
            "pull access denied for x, repository does not exist",
        ] {
            assert!(!is_transient(&error(refusal)), "{refusal}");
        }
    }
}
