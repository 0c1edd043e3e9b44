//! The steps before a job's containers can be created: files and setup commands of this machine, credentials
//! for registries, images.

use std::path::Path;
use std::process::Command;

use actors::metrics::{Count, Time};
use actors::ports::{PreparationError, StepError, StepLog};
use futures_util::future::try_join_all;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::backend::{DockerBackend, Host, SHOWN, listed};
use super::bodies::{KVM, SOCKET};
use super::engine::Engine;
use super::errors::RequestError;
use super::pull::pull_unless_present;
use crate::config::DockerSocket;
use crate::executors::registries::{Registries, RegistryLogin};
use crate::os::programs::output_of;

/// How many of the last lines of a host setup command's output go to the agent's own log.
const SETUP_LINES: usize = 20;

impl DockerBackend {
    pub(super) async fn set_up_host(&mut self) -> Result<Host, PreparationError> {
        self.place.watch(&self.config.environment);
        self.check_files()?;
        if !self.is_spare {
            for command in &self.compose.host_setup_commands {
                self.run_on_host(&command.directive).await?;
            }
        }
        let engine = Engine::connect(&self.config.environment, &self.place.scratch()).await;
        let engine = engine.map_err(StepError::new)?;
        self.place.set_engine(&engine);
        // On another machine the engine's socket is most likely at the usual path. Whether that machine has a
        // KVM device can't be found out.
        self.common.socket = match self.config.socket {
            DockerSocket::Always => engine.socket.clone().or_else(|| Some(SOCKET.into())),
            DockerSocket::Never => None,
        };
        let is_here = engine.socket.is_some();
        self.common.kvm = self.config.expose_kvm && is_here && Path::new(KVM).exists();
        let registries = Registries::for_user(&self.config.home, &self.config.environment);
        self.common.environment = registries.proxy_variables();
        Ok(Host { engine, registries })
    }

    /// Checks which of the configured files exist on this machine; those are mounted.
    fn check_files(&mut self) -> Result<(), PreparationError> {
        let (there, missing): (Vec<_>, Vec<_>) =
            self.config.files.iter().cloned().partition(|mount| mount.host.exists());
        for mount in &missing {
            let path = mount.host.display();
            if self.config.fail_on_missing_files {
                log::error!(path:%; "a host path of `files` is missing; the job fails");
                return Err(PreparationError::NotShown);
            }
            log::warn!(path:%; "a host path of `files` is missing; the job runs without it");
        }
        self.common.files = there;
        Ok(())
    }

    async fn run_on_host(&self, directive: &str) -> Result<(), StepError> {
        let mut command = Command::new("bash");
        command.args(["-c", directive]).env_clear().envs(self.config.environment.iter().cloned());
        command.current_dir(&self.config.home);
        let ended = output_of(command, |group| self.place.set_host_group(group)).await;
        self.place.set_host_group(None);
        let (status, printed) = ended.map_err(|error| {
            StepError::of(format!("the host setup command `{directive}` can't be run"), error)
        })?;
        let printed = String::from_utf8_lossy(&printed);
        // Only the end of the output: all of it could push everything else out of the log.
        let count = printed.lines().count();
        for line in printed.lines().skip(count.saturating_sub(SETUP_LINES)) {
            let line = &line[..line.floor_char_boundary(SHOWN)];
            log::info!(line; "host setup");
        }
        if count > SETUP_LINES {
            log::info!(lines = count - SETUP_LINES; "host setup: earlier lines are omitted");
        }
        if status.success() {
            return Ok(());
        }
        Err(StepError::of(
            format!("the host setup command `{directive}` failed"),
            format!("{status}; its output is in the agent's own log"),
        ))
    }

    pub(super) async fn add_credentials(
        &self,
        host: &mut Host,
        log: &dyn StepLog,
    ) -> Result<(), StepError> {
        let credentials = self.compose.credentials.as_ref().map_err(|problems| listed(problems))?;
        for each in credentials {
            log.print(&format!("Setting up credentials for {}\n", each.kind())).await?;
            let login = RegistryLogin::from_credentials(each, &self.config.environment).await?;
            login.check(&host.engine).await?;
            host.registries.add(login);
        }
        Ok(())
    }

    pub(super) async fn pull_images(
        &self,
        host: &Host,
        log: &dyn StepLog,
    ) -> Result<(), StepError> {
        let (Host { engine, registries }, network) = (host, self.common.network());
        let mut images: Vec<&str> = self.compose.containers().map(|c| c.image.as_str()).collect();
        if self.is_spare {
            images.truncate(1);
        }
        images.sort_unstable();
        images.dedup();
        let (sender, mut lines) = mpsc::unbounded_channel();
        let pulls = try_join_all(images.into_iter().map(|image| {
            let sender = sender.clone();
            let metrics = &self.metrics;
            async move {
                let begun = Instant::now();
                let pulled = pull_unless_present(engine, registries, image, &sender).await;
                let tag = || format!("image:{image}");
                let duration = begun.elapsed();
                metrics.do_send(Time {
                    name: "compose_ci.docker_pull.duration",
                    duration,
                    tag: tag(),
                });
                let name = if pulled.is_ok() {
                    "compose_ci.docker_pull.success.rate"
                } else {
                    "compose_ci.docker_pull.failure.rate"
                };
                metrics.do_send(Count { name, tag: tag() });
                pulled.map_err(|error| StepError::of(image, error))
            }
        }));
        // Creating the network takes a while and needs no image, so it runs along with the pulls.
        let api = engine.api.clone();
        let networked = self.place.make(async move { api.create_network(network).await });
        let work = async {
            let (pulled, networked) = tokio::join!(pulls, networked);
            pulled?;
            let created = networked.map_err(StepError::new)?;
            created.map(drop).map_err(|error| StepError::new(RequestError::from(error)))
        };
        tokio::pin!(work);
        drop(sender);
        let done = loop {
            tokio::select! {
                biased;
                Some(line) = lines.recv() => log.print(&line).await?,
                done = &mut work => break done,
            }
        };
        while let Ok(line) = lines.try_recv() {
            log.print(&line).await?;
        }
        done
    }
}
