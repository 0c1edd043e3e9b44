//! The bodies of the requests that create a job's containers and network. Pure.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use actors::job::containers::{Compose, Container};
use bollard::models::{
    ContainerCreateBody, DeviceMapping, EndpointSettings, HostConfig, HostConfigLogConfig, Mount,
    MountType, NetworkCreateRequest, NetworkingConfig,
};

use crate::config::FileMount;

/// The path in the main container of the engine's socket, with which jobs run containers of their own.
pub(crate) const SOCKET: &str = "/var/run/docker.sock";

/// The device that jobs need to run virtual machines.
pub(crate) const KVM: &str = "/dev/kvm";

/// The label by which a place's containers and networks are found again.
pub(crate) const PLACE_LABEL: &str = "semaphore-agent.place";

/// The label that tells people which job a container belongs to.
const JOB_LABEL: &str = "semaphore-agent.job";

/// The settings that all containers of one place share.
#[derive(Clone, Debug)]
pub(crate) struct Common {
    /// The place's id, unique among all agents that use the engine.
    pub(crate) place: String,
    pub(crate) job: String,
    /// The path of the engine's socket on the engine's machine; `None` if jobs don't get it.
    pub(crate) socket: Option<PathBuf>,
    pub(crate) files: Vec<FileMount>,
    pub(crate) kvm: bool,
    /// Variables of every container; a container's own win.
    pub(crate) environment: Vec<(String, String)>,
}

/// Returns the engine's name for the main container of `place`.
pub(crate) fn main_container_name(place: &str, compose: &Compose) -> String {
    container_name(place, compose.main.name.as_str())
}

fn container_name(place: &str, container: &str) -> String {
    format!("semaphore-{place}-{container}")
}

/// The command of the main container, which its entrypoint may wrap: an outer bash with the job's shell as
/// its child.
///
/// The outer bash may run as PID 1, where it reaps orphans. The job's shell must not be PID 1, as it would
/// then ignore signals that it sends to itself; and the engine's own init would keep entrypoints from being
/// PID 1. `-p` makes the outer bash ignore `BASH_ENV` and functions from the environment. Its standard error
/// is `/dev/null`, so that it does not print how the job's shell ended.
const SHELL: [&str; 4] = ["bash", "-p", "-c", "exec 3>&2 2>/dev/null; bash 2>&3 3>&-; exit $?"];

impl Common {
    fn labels(&self) -> HashMap<String, String> {
        HashMap::from([
            (PLACE_LABEL.to_owned(), self.place.clone()),
            (JOB_LABEL.to_owned(), self.job.clone()),
        ])
    }

    fn network_name(&self) -> String {
        format!("semaphore-{}", self.place)
    }

    /// Returns the engine's name for the container that the job calls `container`.
    pub(crate) fn container_name(&self, container: &str) -> String {
        container_name(&self.place, container)
    }

    pub(crate) fn network(&self) -> NetworkCreateRequest {
        NetworkCreateRequest {
            name: self.network_name(),
            labels: Some(self.labels()),
            ..Default::default()
        }
    }

    /// Returns the body for a container that runs its image's program.
    pub(crate) fn side_container(&self, container: &Container) -> ContainerCreateBody {
        let Container { image, entrypoint, command, user, .. } = container;
        let alias = container.name.as_str().to_owned();
        let endpoint = EndpointSettings { aliases: Some(vec![alias]), ..Default::default() };
        let networks = HashMap::from([(self.network_name(), endpoint)]);
        let device = DeviceMapping {
            path_on_host: Some(KVM.into()),
            path_in_container: Some(KVM.into()),
            cgroup_permissions: Some("rwm".into()),
        };
        ContainerCreateBody {
            image: Some(image.clone()),
            // As in Compose, an entrypoint of the job's also drops the image's command.
            entrypoint: Some(entrypoint.clone()).filter(|words| !words.is_empty()),
            cmd: Some(command.clone()).filter(|words| !words.is_empty()),
            user: user.clone(),
            env: Some(self.environment_of(container)),
            labels: Some(self.labels()),
            host_config: Some(HostConfig {
                network_mode: Some(self.network_name()),
                // When memory runs out, the kernel is to kill a job before the engine and the agent.
                oom_score_adj: Some(500),
                devices: self.kvm.then(|| vec![device]),
                ..Default::default()
            }),
            networking_config: Some(NetworkingConfig { endpoints_config: Some(networks) }),
            ..Default::default()
        }
    }

    /// Returns the body for the container that runs the job's shell.
    pub(crate) fn main_container(&self, container: &Container) -> ContainerCreateBody {
        let mut body = self.side_container(container);
        body.cmd = Some(SHELL.map(str::to_owned).into());
        (body.tty, body.open_stdin, body.stdin_once) = (Some(true), Some(true), Some(true));
        (body.attach_stdin, body.attach_stdout, body.attach_stderr) =
            (Some(true), Some(true), Some(true));
        let mount = |source: &Path, target: &Path| Mount {
            typ: Some(MountType::BIND),
            source: Some(source.display().to_string()),
            target: Some(target.display().to_string()),
            ..Default::default()
        };
        let socket = self.socket.iter().map(|socket| mount(socket, SOCKET.as_ref()));
        let files = self.files.iter().map(|file| mount(&file.host, &file.container));
        if let Some(host) = &mut body.host_config {
            // Mounts instead of binds: the engine does not create a directory for a missing source.
            host.mounts = Some(socket.chain(files).collect());
            // The agent reads the terminal; the engine must not keep a copy of the output.
            host.log_config = Some(HostConfigLogConfig { typ: Some("none".into()), config: None });
        }
        body
    }

    fn environment_of(&self, container: &Container) -> Vec<String> {
        let own = container.environment.iter().map(|variable| {
            let value = String::from_utf8_lossy(&variable.value);
            (variable.name.as_str(), value.into_owned())
        });
        let common = self.environment.iter().map(|(name, value)| (name.as_str(), value.clone()));
        // If a name occurs twice, the engine uses the last value.
        common.chain(own).map(|(name, value)| format!("{name}={value}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use actors::job::containers::ContainerName;
    use actors::job::{EnvVar, VariableName};
    use bytes::Bytes;

    use super::*;

    fn common() -> Common {
        Common {
            place: "p".into(),
            job: "j".into(),
            socket: Some("/run/engine".into()),
            files: vec![FileMount { host: "/h".into(), container: "/c".into() }],
            kvm: false,
            environment: vec![("HTTP_PROXY".into(), "p".into())],
        }
    }

    fn container() -> Container {
        Container {
            name: ContainerName::new("db").unwrap(),
            image: "postgres".into(),
            entrypoint: vec!["/init".into()],
            command: vec!["a b".into(), "c".into()],
            user: Some("1000:1000".into()),
            environment: vec![EnvVar {
                name: VariableName::new("A").unwrap(),
                value: Bytes::from_static(b"x=y"),
            }],
            files: Vec::new(),
        }
    }

    #[test]
    fn side_containers_are_created_as_by_compose() {
        let body = common().side_container(&container());
        assert_eq!(body.entrypoint, Some(vec!["/init".into()]));
        assert_eq!(body.cmd, Some(vec!["a b".into(), "c".into()]));
        assert_eq!(body.user.as_deref(), Some("1000:1000"));
        assert_eq!(body.env, Some(vec!["HTTP_PROXY=p".into(), "A=x=y".into()]));
        let networks = body.networking_config.unwrap().endpoints_config.unwrap();
        assert_eq!(networks["semaphore-p"].aliases, Some(vec!["db".into()]));
        assert_eq!(body.labels.unwrap()[PLACE_LABEL], "p");
        let host = body.host_config.unwrap();
        assert_eq!(
            (host.mounts, host.devices, host.network_mode.as_deref()),
            (None, None, Some("semaphore-p"))
        );
    }

    #[test]
    fn the_main_container_runs_bash_instead_of_its_command() {
        let body = Common { kvm: true, ..common() }.main_container(&container());
        assert_eq!(body.cmd, Some(SHELL.map(str::to_owned).into()));
        assert_eq!(body.entrypoint, Some(vec!["/init".into()]));
        let host = body.host_config.unwrap();
        let mounts = host.mounts.unwrap();
        let mounts: Vec<_> = mounts
            .iter()
            .map(|mount| (mount.source.as_deref().unwrap(), mount.target.as_deref().unwrap()))
            .collect();
        assert_eq!(mounts, [("/run/engine", SOCKET), ("/h", "/c")]);
        assert_eq!(host.devices.unwrap()[0].path_on_host.as_deref(), Some(KVM));
    }
}
