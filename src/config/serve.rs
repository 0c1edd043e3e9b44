//! The options of `agent serve`.

use std::path::PathBuf;
use std::time::Duration;

use super::common::{
    CONFIG_FILE, DOCKER_SOCKET, FILES, GRACE_PERIOD, INTERRUPTION_GRACE_PERIOD,
    SSH_JUMP_POINT_PATH, STATE_DIR, file_mounts, hook_path, jump_point, state_dir,
};
use super::layers::{Flags, OptionSet, Settings};
use super::options::{AtLeastOne, Opt, Seconds, Spec};
use super::secret::SecretOptions;
use super::{ConfigError, DockerSocket, FileMount, Secret};
use crate::api::tls::PairSource;
use crate::metrics::statsd::StatsdConfig;
use crate::service::environment::Environment;

/// Shorter secrets cause a warning, as they can be guessed. In bytes.
const RECOMMENDED_SECRET_LENGTH: usize = 16;

const SECRET: SecretOptions = SecretOptions {
    name: "secret",
    value: Opt::new(
        "auth-token-secret",
        "SECRET",
        "The secret that clients' tokens are signed with; prefer a file or a descriptor, as every user of the machine can see flags",
    )
    .group("secret")
    .example("..."),
    file: Opt::new("auth-token-secret-file", "FILE", "A file that holds the secret")
        .group("secret")
        .set_in_example("/etc/semaphore-agent/secret"),
    descriptor: Opt::new(
        "auth-token-secret-fd",
        "NUMBER",
        "The number of an open file descriptor from which to read the secret; jobs can't read it, unlike a file of the agent's user",
    )
    .group("secret")
    .example("3"),
};

const HOST: Opt<String> = Opt::new("host", "HOST", "The address to listen on").default("0.0.0.0");

const PORT: Opt<u16> =
    Opt::new("port", "PORT", "The port to listen on; 0 for any free port").default("8000");

const TLS_CERT_PATH: Opt<PathBuf> = Opt::new("tls-cert-path", "FILE", "The certificate, in PEM")
    .default_in_words("server.crt in the working directory; a self-signed certificate if neither server.crt nor server.key exists")
    .example("/etc/semaphore-agent/server.crt");

const TLS_KEY_PATH: Opt<PathBuf> =
    Opt::new("tls-key-path", "FILE", "The certificate's private key, in PEM")
        .default_in_words("server.key in the working directory")
        .example("/etc/semaphore-agent/server.key");

const STATSD_HOST: Opt<String> = Opt::new(
    "statsd-host",
    "HOST",
    "The host of a DogStatsD server; metrics need both statsd-host and statsd-port",
)
.example("127.0.0.1");

const STATSD_PORT: Opt<u16> =
    Opt::new("statsd-port", "PORT", "The UDP port of the DogStatsD server").example("8125");

const STATSD_NAMESPACE: Opt<String> =
    Opt::new("statsd-namespace", "NAMESPACE", "The prefix of all metric names")
        .default("agent.prod");

const CALLBACK_RETRY_ATTEMPTS: Opt<u32> = Opt::new(
    "callback-retry-attempts",
    "NUMBER",
    "How many times to try a callback, a second apart",
)
.default("300");

const PRE_JOB_HOOK_PATH: Opt<PathBuf> = Opt::new(
    "pre-job-hook-path",
    "FILE",
    "A script that every job's shell sources before the first command; if the script fails, so does the job",
)
.example("/etc/semaphore-agent/pre-job-hook");

const EXPOSE_KVM_DEVICE: Opt<bool> =
    Opt::new("expose-kvm-device", "BOOL", "Whether containers get /dev/kvm").default("true");

const ARCHIVE_TIMEOUT: Opt<Seconds> = Opt::new(
    "archive-timeout",
    "SECONDS",
    "How long a finished job waits for an archivator to fetch its log, in seconds; at most a minute once the agent is asked to end",
)
.default("3600");

const MAX_CONNECTIONS_PER_CLIENT: Opt<AtLeastOne> = Opt::new(
    "max-connections-per-client",
    "NUMBER",
    "How many connections one address may have; a platform behind one proxy counts as one address",
)
.default_in_words("no separate limit")
.example("1000");

const MAX_BODY_SIZE: Opt<usize> =
    Opt::new("max-body-size", "BYTES", "The largest request body, in bytes").default("33554432");

const SINGLE_JOB: Opt<bool> =
    Opt::new("single-job", "BOOL", "Take one job only, and end after it").default("false");

/// The options of `agent serve`.
#[derive(Clone, Debug)]
pub struct Serve;

impl OptionSet for Serve {
    const HAS_FILE: bool = true;
    const OPTIONS: &'static [&'static Spec] = &[
        &CONFIG_FILE.spec,
        &SECRET.value.spec,
        &SECRET.file.spec,
        &SECRET.descriptor.spec,
        &HOST.spec,
        &PORT.spec,
        &TLS_CERT_PATH.spec,
        &TLS_KEY_PATH.spec,
        &STATSD_HOST.spec,
        &STATSD_PORT.spec,
        &STATSD_NAMESPACE.spec,
        &CALLBACK_RETRY_ATTEMPTS.spec,
        &PRE_JOB_HOOK_PATH.spec,
        &FILES.spec,
        &EXPOSE_KVM_DEVICE.spec,
        &DOCKER_SOCKET.spec,
        &ARCHIVE_TIMEOUT.spec,
        &GRACE_PERIOD.spec,
        &MAX_CONNECTIONS_PER_CLIENT.spec,
        &MAX_BODY_SIZE.spec,
        &SINGLE_JOB.spec,
        &INTERRUPTION_GRACE_PERIOD.spec,
        &STATE_DIR.spec,
        &SSH_JUMP_POINT_PATH.spec,
    ];
}

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
