//! What containers and networks are made from. Pure.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use actors::job::containers::{Compose, Container};
use bollard::models::{
    ContainerCreateBody, DeviceMapping, EndpointSettings, HostConfig, HostConfigLogConfig, Mount,
    MountType, NetworkCreateRequest, NetworkingConfig,
};

use crate::config::FileMount;

/// Where jobs find the engine, to run containers of their own.
pub(crate) const SOCKET: &str = "/var/run/docker.sock";

/// What virtual machines in containers need.
pub(crate) const KVM: &str = "/dev/kvm";

/// What containers and networks of agents are marked with.
pub(crate) const PLACE_LABEL: &str = "semaphore-agent.place";
const JOB_LABEL: &str = "semaphore-agent.job";

/// What all containers of one place have in common.
#[derive(Clone, Debug)]
pub(crate) struct Common {
    /// Unique among all agents of the engine.
    pub(crate) place: String,
    pub(crate) job: String,
    /// The engine's socket on its own machine; nothing if there is none.
    pub(crate) socket: Option<PathBuf>,
    pub(crate) files: Vec<FileMount>,
    pub(crate) kvm: bool,
    /// Besides the container's own.
    pub(crate) environment: Vec<(String, String)>,
}

/// The name that the main container of a place gets.
pub(crate) fn main_container_name(place: &str, compose: &Compose) -> String {
    container_name(place, compose.main.name.as_str())
}

fn container_name(place: &str, container: &str) -> String {
    format!("semaphore-{place}-{container}")
}

/// What the main container's entrypoint gets: the job's shell below another bash, which may be the first process
/// and reaps what has lost its parent. As the first process the job's shell would not heed a signal that it sends
/// to itself; and the engine's init in front would keep entrypoints from being the first process. With `-p` bash
/// neither reads `BASH_ENV` nor takes functions from the environment. It keeps to itself how the other one ended.
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

    /// The engine's name for the container that the others call `container`.
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

    /// A container that runs what its image does.
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
            // An entrypoint of the job's takes the image's command away, as Compose has it.
            entrypoint: Some(entrypoint.clone()).filter(|words| !words.is_empty()),
            cmd: Some(command.clone()).filter(|words| !words.is_empty()),
            user: user.clone(),
            env: Some(self.environment_of(container)),
            labels: Some(self.labels()),
            host_config: Some(HostConfig {
                network_mode: Some(self.network_name()),
                // When memory runs out, a job goes before the engine and the agent.
                oom_score_adj: Some(500),
                devices: self.kvm.then(|| vec![device]),
                ..Default::default()
            }),
            networking_config: Some(NetworkingConfig { endpoints_config: Some(networks) }),
            ..Default::default()
        }
    }

    /// The container where the job's shell runs.
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
            // Unlike a bind, a mount makes no directory where its source is missing.
            host.mounts = Some(socket.chain(files).collect());
            // What is printed goes to the agent, and nowhere else.
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
        // The last of a name wins.
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
    fn side_containers_are_what_compose_makes_of_them() {
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
    fn the_main_container_runs_bash_whatever_its_command_is() {
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
