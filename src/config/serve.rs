//! The options of `agent serve`.

mod options;

use std::path::PathBuf;
use std::time::Duration;

pub use self::options::Serve;
use self::options::{
    ARCHIVE_TIMEOUT, CALLBACK_RETRY_ATTEMPTS, EXPOSE_KVM_DEVICE, HOST, MAX_BODY_SIZE,
    MAX_CONNECTIONS_PER_CLIENT, PORT, PRE_JOB_HOOK_PATH, SECRET, SINGLE_JOB, STATSD_HOST,
    STATSD_NAMESPACE, STATSD_PORT, TLS_CERT_PATH, TLS_KEY_PATH,
};
use super::common::{
    DOCKER_SOCKET, GRACE_PERIOD, INTERRUPTION_GRACE_PERIOD, STATE_DIR, file_mounts, hook_path,
    jump_point, state_dir,
};
use super::layers::{Flags, Settings};
use super::option::AtLeastOne;
use super::{ConfigError, DockerSocket, FileMount, Secret};
use crate::api::tls::PairSource;
use crate::metrics::statsd::StatsdConfig;
use crate::service::environment::Environment;

/// Shorter secrets cause a warning, as they can be guessed. In bytes.
const RECOMMENDED_SECRET_LENGTH: usize = 16;

/// The options, merged and checked.
#[derive(Clone, Debug)]
pub struct ServeConfig {
    /// The secret that clients' tokens are signed with; not empty.
    pub secret: Secret,
    /// The address to listen on.
    pub host: String,
    /// The port to listen on; 0 for any free port.
    pub port: u16,
    /// Where the certificate and its key come from.
    pub tls: PairSource,
    /// The DogStatsD server; `None` sends no metrics.
    pub statsd: Option<StatsdConfig>,
    /// How many times a callback is tried.
    pub callback_attempts: u32,
    /// The path of a script that every job's shell sources before the first command.
    pub pre_job_hook: Option<String>,
    /// Files of this machine to mount into containers.
    pub files: Vec<FileMount>,
    /// Whether containers get `/dev/kvm`.
    pub expose_kvm: bool,
    /// Whether jobs in containers get the engine's socket.
    pub docker_socket: DockerSocket,
    /// How long a finished job waits for an archivator to fetch its log.
    pub archive_timeout: Duration,
    /// How long the processes of a finished or stopped job have to end.
    pub grace: Duration,
    /// Limit for the connections of one address, in addition to the limit for all.
    pub connections_per_client: Option<usize>,
    /// Limit for the body of a request, in bytes.
    pub max_body_size: usize,
    /// Whether the agent ends after its first job.
    pub single_job: bool,
    /// How long a running job may go on after the agent was asked to end.
    pub interruption_grace: Duration,
    /// The agent's private directory.
    pub state_dir: PathBuf,
    /// Where to install the script that people run over SSH to enter a job.
    pub jump_point: PathBuf,
    /// Warnings for the operator.
    pub warnings: Vec<String>,
    /// All options with their values and origins, one per line.
    pub printed: String,
}

impl ServeConfig {
    /// Merges flags, variables, and the file that one of them names, and checks the result.
    pub fn load(flags: &Flags<Serve>, environment: &Environment) -> Result<Self, ConfigError> {
        let mut settings = Settings::merge(flags, environment)?;
        let secret = SECRET.read(&mut settings)?;
        let length = secret.reveal().len();
        if length < RECOMMENDED_SECRET_LENGTH {
            settings.warnings.push(format!(
                "auth-token-secret has only {length} bytes and can be guessed; use at least {RECOMMENDED_SECRET_LENGTH}"
            ));
        }
        let statsd = match (settings.get(&STATSD_HOST), settings.get(&STATSD_PORT)) {
            (Some(host), Some(port)) => {
                let namespace = settings.get_or_empty(&STATSD_NAMESPACE);
                Some(StatsdConfig { host, port, namespace })
            }
            (None, None) => None,
            _ => {
                let why = "no metrics: set both statsd-host and statsd-port";
                settings.warnings.push(why.into());
                None
            }
        };
        let state_dir = state_dir(&settings, environment);
        let (cert, key) = (settings.get(&TLS_CERT_PATH), settings.get(&TLS_KEY_PATH));
        let tls = PairSource::choose(cert, key, state_dir.join("tls"));
        let tls = tls?;
        settings.warnings.extend(tls.warning());
        let shown_state_dir = state_dir.to_string_lossy().into();
        Ok(Self {
            secret,
            host: settings.get_or_empty(&HOST),
            port: settings.get_or_empty(&PORT),
            tls,
            statsd,
            callback_attempts: settings.get_or_empty(&CALLBACK_RETRY_ATTEMPTS),
            pre_job_hook: hook_path(&settings, &PRE_JOB_HOOK_PATH)?,
            files: file_mounts(&settings)?,
            expose_kvm: settings.get_or_empty(&EXPOSE_KVM_DEVICE),
            docker_socket: settings.get_or_empty(&DOCKER_SOCKET),
            archive_timeout: settings.get_or_empty(&ARCHIVE_TIMEOUT).duration(),
            grace: settings.get_or_empty(&GRACE_PERIOD).duration(),
            connections_per_client: settings
                .get(&MAX_CONNECTIONS_PER_CLIENT)
                .map(|AtLeastOne(most)| most),
            max_body_size: settings.get_or_empty(&MAX_BODY_SIZE),
            single_job: settings.get_or_empty(&SINGLE_JOB),
            interruption_grace: settings.get_or_empty(&INTERRUPTION_GRACE_PERIOD).duration(),
            jump_point: jump_point(&settings)?,
            printed: settings.printed(&[(&STATE_DIR.spec, shown_state_dir)]),
            state_dir,
            warnings: settings.warnings,
        })
    }
}
