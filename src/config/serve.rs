//! The options of `agent serve`.

use std::path::PathBuf;
use std::time::Duration;

use clap::CommandFactory as _;
use serde::Deserialize;

use super::{ConfigError, DEFAULT_GRACE, DockerSocket, FileMount, FileOptions, Secret, read_file};
use crate::api::tls::PairSource;
use crate::commands::cli::Cli;
use crate::metrics::statsd::StatsdConfig;
use crate::ssh_access;
use crate::state::StateDir;

/// Callbacks are sent every second, so often.
const DEFAULT_CALLBACK_ATTEMPTS: u32 = 300;

/// In seconds.
const DEFAULT_ARCHIVE_TIMEOUT: u32 = 3600;

/// A secret that is shorter can be guessed, in bytes.
const SHORTEST_SECRET: usize = 16;

/// In bytes.
const DEFAULT_MAX_BODY_SIZE: usize = 32 * 1024 * 1024;

/// The variable for `files`, whose parts are separated by white space there.
const FILES_VARIABLE: &str = "SEMAPHORE_AGENT_FILES";

/// Raw options: what is absent is not set.
#[derive(Clone, Debug, Default, clap::Args, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct ServeOptions {
    /// A YAML file with any of these options as keys
    #[arg(long, env = "SEMAPHORE_AGENT_CONFIG_FILE", value_name = "FILE", alias = "config")]
    #[serde(skip)]
    pub config_file: Option<PathBuf>,

    /// The secret that clients sign their tokens with; better not as a flag, which everybody on the
    /// machine can see
    #[arg(long, env = "SEMAPHORE_AGENT_AUTH_TOKEN_SECRET", hide_env_values = true)]
    #[arg(value_name = "SECRET")]
    pub auth_token_secret: Option<Secret>,

    /// A file that holds this secret
    #[arg(long, env = "SEMAPHORE_AGENT_AUTH_TOKEN_SECRET_FILE", value_name = "FILE")]
    pub auth_token_secret_file: Option<PathBuf>,

    /// The number of an open descriptor that this secret is read from: a way that jobs can't go, unlike a file of the
    /// agent's user
    #[arg(long, env = "SEMAPHORE_AGENT_AUTH_TOKEN_SECRET_FD", value_name = "NUMBER")]
    pub auth_token_secret_fd: Option<u32>,

    /// The address to listen on [default: 0.0.0.0]
    #[arg(long, env = "SEMAPHORE_AGENT_HOST")]
    pub host: Option<String>,

    /// The port to listen on; 0 for any that is free [default: 8000]
    #[arg(long, env = "SEMAPHORE_AGENT_PORT")]
    pub port: Option<u16>,

    /// The certificate, in PEM [default: server.crt in the working directory; without that and
    /// server.key, a pair of the agent's own]
    #[arg(long, env = "SEMAPHORE_AGENT_TLS_CERT_PATH", value_name = "FILE")]
    pub tls_cert_path: Option<PathBuf>,

    /// Its private key, in PEM [default: server.key in the working directory]
    #[arg(long, env = "SEMAPHORE_AGENT_TLS_KEY_PATH", value_name = "FILE")]
    pub tls_key_path: Option<PathBuf>,

    /// The host of a DogStatsD server; no metrics without it and its port
    #[arg(long, env = "SEMAPHORE_AGENT_STATSD_HOST", value_name = "HOST")]
    pub statsd_host: Option<String>,

    /// The UDP port of that server
    #[arg(long, env = "SEMAPHORE_AGENT_STATSD_PORT", value_name = "PORT")]
    pub statsd_port: Option<u16>,

    /// What the names of metrics begin with [default: agent.prod]
    #[arg(long, env = "SEMAPHORE_AGENT_STATSD_NAMESPACE", value_name = "NAMESPACE")]
    pub statsd_namespace: Option<String>,

    /// How often a callback is tried, a second apart [default: 300]
    #[arg(long, env = "SEMAPHORE_AGENT_CALLBACK_RETRY_ATTEMPTS", value_name = "NUMBER")]
    pub callback_retry_attempts: Option<u32>,

    /// A script that the shell of every job sources before the first command; if it fails, so does
    /// the job
    #[arg(long, env = "SEMAPHORE_AGENT_PRE_JOB_HOOK_PATH", value_name = "FILE")]
    pub pre_job_hook_path: Option<PathBuf>,

    /// Files of this machine that are put into containers
    #[arg(long, value_name = "HOST:CONTAINER,...", value_delimiter = ',')]
    pub files: Option<Vec<String>>,

    /// Whether containers get /dev/kvm [default: true]
    #[arg(long, env = "SEMAPHORE_AGENT_EXPOSE_KVM_DEVICE", value_name = "BOOL")]
    #[arg(num_args = 0..=1, default_missing_value = "true")]
    pub expose_kvm_device: Option<bool>,

    /// Whether jobs in containers get the socket of the Docker Engine, which makes them root on its machine
    /// [default: always]
    #[arg(long, env = "SEMAPHORE_AGENT_DOCKER_SOCKET", value_name = "WHEN", value_enum)]
    pub docker_socket: Option<DockerSocket>,

    /// How long the end of a job waits for an archivator to fetch the log, in seconds; a minute at most when the agent is
    /// to end [default: 3600]
    #[arg(long, env = "SEMAPHORE_AGENT_ARCHIVE_TIMEOUT", value_name = "SECONDS")]
    pub archive_timeout: Option<u32>,

    /// How long what a job leaves running has to end when it is asked to, in seconds [default: 2]
    #[arg(long, env = "SEMAPHORE_AGENT_GRACE_PERIOD", value_name = "SECONDS")]
    pub grace_period: Option<u32>,

    /// How many connections one address may have [default: as many as there can be]
    #[arg(long, env = "SEMAPHORE_AGENT_MAX_CONNECTIONS_PER_CLIENT", value_name = "NUMBER")]
    pub max_connections_per_client: Option<usize>,

    /// The largest request body, in bytes [default: 33554432]
    #[arg(long, env = "SEMAPHORE_AGENT_MAX_BODY_SIZE", value_name = "BYTES")]
    pub max_body_size: Option<usize>,

    /// Take one job only, and end after it [default: false]
    #[arg(long, env = "SEMAPHORE_AGENT_SINGLE_JOB", value_name = "BOOL")]
    #[arg(num_args = 0..=1, default_missing_value = "true")]
    pub single_job: Option<bool>,

    /// How long a job may go on after SIGTERM or SIGINT, in seconds [default: 0]
    #[arg(long, env = "SEMAPHORE_AGENT_INTERRUPTION_GRACE_PERIOD", value_name = "SECONDS")]
    pub interruption_grace_period: Option<u64>,

    /// A private directory for what the agent keeps [default: below the user's state directory,
    /// usually ~/.local/state/semaphore-agent]
    #[arg(long, env = "SEMAPHORE_AGENT_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,

    /// Where the script is put that people start over SSH [default: `/tmp/ssh_jump_point`]
    #[arg(long, env = "SEMAPHORE_AGENT_SSH_JUMP_POINT_PATH", value_name = "FILE")]
    pub ssh_jump_point_path: Option<PathBuf>,
}

impl FileOptions for ServeOptions {
    const SECRETS: &'static [&'static str] = &["auth-token-secret"];
}

/// The options, merged and checked.
#[derive(Clone, Debug)]
pub struct ServeConfig {
    /// What tokens are signed with; not empty.
    pub secret: Secret,
    /// The address to listen on.
    pub host: String,
    /// The port to listen on; 0 for any.
    pub port: u16,
    /// Where the certificate and its key come from.
    pub tls: PairSource,
    /// Where metrics go, if anywhere.
    pub statsd: Option<StatsdConfig>,
    /// How often a callback is tried.
    pub callback_attempts: u32,
    /// Sourced before the commands of every job.
    pub pre_job_hook: Option<String>,
    /// What containers get of this machine's files.
    pub files: Vec<FileMount>,
    /// Whether containers get `/dev/kvm`.
    pub expose_kvm: bool,
    /// Whether jobs in containers get the engine's socket.
    pub docker_socket: DockerSocket,
    /// How long the end of a job waits for an archivator.
    pub archive_timeout: Duration,
    /// How long what a job leaves running has to end.
    pub grace: Duration,
    /// How many connections one address may have, if not as many as there can be.
    pub connections_per_client: Option<usize>,
    /// The largest body of a request, in bytes.
    pub max_body_size: usize,
    /// Whether the agent ends after its first job.
    pub single_job: bool,
    /// How long a job may go on when the agent is asked to end.
    pub interruption_grace: Duration,
    /// The agent's private directory.
    pub state_dir: PathBuf,
    /// Where the script is put that people start over SSH.
    pub jump_point: PathBuf,
    /// What the operator may want to know.
    pub warnings: Vec<String>,
}

impl ServeConfig {
    /// Merges flags and environment, which clap has merged, with the file that they name.
    pub fn load(mut options: ServeOptions) -> Result<Self, ConfigError> {
        options.files = options.files.or_else(|| {
            let files = std::env::var(FILES_VARIABLE).ok()?;
            Some(files.split_whitespace().map(str::to_owned).collect())
        });
        // A secret given in one way is not to be mixed with one given in another.
        let secret_is_set = options.auth_token_secret.is_some()
            || options.auth_token_secret_file.is_some()
            || options.auth_token_secret_fd.is_some();
        if let Some(path) = &options.config_file {
            let (mut file, _) = read_file::<ServeOptions>(path)?;
            if secret_is_set {
                (file.auth_token_secret, file.auth_token_secret_file) = (None, None);
                file.auth_token_secret_fd = None;
            }
            fill!(options from file;
                auth_token_secret, auth_token_secret_file, auth_token_secret_fd,
                host, port, tls_cert_path, tls_key_path,
                statsd_host, statsd_port, statsd_namespace, callback_retry_attempts,
                pre_job_hook_path, files, expose_kvm_device, docker_socket, archive_timeout,
                grace_period, max_connections_per_client, max_body_size, single_job,
                interruption_grace_period, state_dir, ssh_jump_point_path,
            );
        }
        Self::validate(options)
    }

    fn validate(options: ServeOptions) -> Result<Self, ConfigError> {
        let mut warnings: Vec<String> = super::unknown_variables(&known_variables())
            .into_iter()
            .map(|name| format!("{name} is no option of this agent"))
            .collect();
        let (secret, warning) = secret(
            options.auth_token_secret,
            options.auth_token_secret_file,
            options.auth_token_secret_fd,
        )?;
        warnings.extend(warning);
        let length = secret.reveal().len();
        if length < SHORTEST_SECRET {
            warnings.push(format!(
                "auth-token-secret has {length} bytes only, and can be guessed; {SHORTEST_SECRET} and more are usual"
            ));
        }
        if options.max_connections_per_client == Some(0) {
            let why = "max-connections-per-client: 0 would let nobody in";
            return Err(ConfigError(why.to_owned()));
        }
        let statsd = match (options.statsd_host, options.statsd_port) {
            (Some(host), Some(port)) => {
                let namespace = options.statsd_namespace.unwrap_or_else(|| "agent.prod".into());
                Some(StatsdConfig { host, port, namespace })
            }
            (None, None) => None,
            _ => {
                warnings.push("no metrics: both statsd-host and statsd-port are needed".into());
                None
            }
        };
        // The job's shell is in another directory.
        let pre_job_hook = options.pre_job_hook_path.map(|path| {
            let path = std::path::absolute(&path).unwrap_or(path);
            path.into_os_string().into_string().map_err(|path| {
                ConfigError(format!("pre-job-hook-path: {} is not UTF-8", path.display()))
            })
        });
        let home = std::env::home_dir().unwrap_or_default();
        let state_dir = options.state_dir.unwrap_or_else(|| StateDir::default_path(&home));
        let jump_point =
            options.ssh_jump_point_path.unwrap_or_else(|| ssh_access::DEFAULT_SCRIPT.into());
        if !jump_point.is_absolute() {
            let path = jump_point.display();
            return Err(ConfigError(format!(
                "ssh-jump-point-path: {path} is not an absolute path"
            )));
        }
        let files = options.files.unwrap_or_default();
        let files: Result<_, String> = files.iter().map(|pair| pair.trim().parse()).collect();
        let own_pair = state_dir.join("tls");
        let tls = PairSource::choose(options.tls_cert_path, options.tls_key_path, own_pair);
        let tls = tls.map_err(|error| ConfigError(error.to_string()))?;
        warnings.extend(tls.warning());
        let seconds = |given: u32| Duration::from_secs(given.into());
        Ok(Self {
            secret,
            host: options.host.unwrap_or_else(|| "0.0.0.0".into()),
            port: options.port.unwrap_or(8000),
            tls,
            statsd,
            callback_attempts: options.callback_retry_attempts.unwrap_or(DEFAULT_CALLBACK_ATTEMPTS),
            pre_job_hook: pre_job_hook.transpose()?,
            files: files.map_err(|why| ConfigError(format!("files: {why}")))?,
            expose_kvm: options.expose_kvm_device.unwrap_or(true),
            docker_socket: options.docker_socket.unwrap_or_default(),
            archive_timeout: seconds(options.archive_timeout.unwrap_or(DEFAULT_ARCHIVE_TIMEOUT)),
            grace: options.grace_period.map_or(DEFAULT_GRACE, seconds),
            connections_per_client: options.max_connections_per_client,
            max_body_size: options.max_body_size.unwrap_or(DEFAULT_MAX_BODY_SIZE),
            single_job: options.single_job.unwrap_or(false),
            interruption_grace: Duration::from_secs(options.interruption_grace_period.unwrap_or(0)),
            state_dir,
            jump_point,
            warnings,
        })
    }
}

/// The secret, and what the operator may want to know about its file.
fn secret(
    given: Option<Secret>,
    file: Option<PathBuf>,
    descriptor: Option<u32>,
) -> Result<(Secret, Option<String>), ConfigError> {
    let (secret, warning) = match (given, file, descriptor) {
        (None, None, None) => {
            return Err(ConfigError(
                "no secret: set SEMAPHORE_AGENT_AUTH_TOKEN_SECRET, or name a file with \
                 --auth-token-secret-file"
                    .to_owned(),
            ));
        }
        (Some(secret), None, None) => (secret, None),
        (None, Some(path), None) => Secret::read(&path).map_err(|error| {
            ConfigError(format!("auth-token-secret-file: {}: {error}", path.display()))
        })?,
        (None, None, Some(number)) => {
            let secret = Secret::read_descriptor(number)
                .map_err(|error| ConfigError(format!("auth-token-secret-fd: {number}: {error}")))?;
            (secret, None)
        }
        (Some(_), Some(_), None) => {
            let why = "auth-token-secret and auth-token-secret-file are both set; one is needed";
            return Err(ConfigError(why.to_owned()));
        }
        (_, _, Some(_)) => {
            let why = "auth-token-secret-fd is set beside auth-token-secret or \
                       auth-token-secret-file; one is needed";
            return Err(ConfigError(why.to_owned()));
        }
    };
    if secret.reveal().is_empty() {
        let why = "auth-token-secret is empty: anybody could sign a token with it";
        return Err(ConfigError(why.to_owned()));
    }
    Ok((secret, warning))
}

/// The variables of the environment that mean something to `agent serve`.
fn known_variables() -> Vec<String> {
    let cli = Cli::command();
    let serve = cli.find_subcommand("serve");
    let options = serve.into_iter().flat_map(clap::Command::get_arguments);
    let options = options.filter_map(|option| Some(option.get_env()?.to_str()?.to_owned()));
    let others = [
        FILES_VARIABLE,
        "SEMAPHORE_AGENT_LOG_LEVEL",
        "SEMAPHORE_AGENT_LOG_FILE_PATH",
        "SEMAPHORE_AGENT_LOG_MAX_SIZE",
        "SEMAPHORE_AGENT_LOGS_COMPRESSION_SIZE",
    ];
    options.chain(others.map(str::to_owned)).collect()
}
