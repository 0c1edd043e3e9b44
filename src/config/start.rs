//! The options of `agent start`.

mod options;

use std::path::PathBuf;
use std::time::Duration;

use actors::job::{EnvVar, VariableName};
use actors::supervisor::{HookFailure, JobHooks, PostJobHook, PreJobHook};
use awc::http::uri::Authority;
use bytes::Bytes;

pub use self::options::Start;
use self::options::{
    CA_FILE, DISCONNECT_AFTER_IDLE_TIMEOUT, DISCONNECT_AFTER_JOB, ENDPOINT, ENV_VARS,
    FAIL_ON_MISSING_FILES, FAIL_ON_PRE_JOB_HOOK_ERROR, HOOK_TIMEOUT, JOB_ID, KEEP_DAEMONS,
    KUBERNETES_EXECUTOR, LOG_DELIVERY_TIMEOUT, NAME, NAME_FROM_ENV, NO_HTTPS, POST_JOB_HOOK_PATH,
    PRE_JOB_HOOK_PATH, SHUTDOWN_HOOK_PATH, SOURCE_PRE_JOB_HOOK, TOKEN, UPLOAD_JOB_LOGS,
};
use super::common::{
    DOCKER_SOCKET, GRACE_PERIOD, INTERRUPTION_GRACE_PERIOD, STATE_DIR, file_mounts, hook_path,
    jump_point, state_dir,
};
use super::layers::{Flags, OptionSet, Settings};
use super::option::{Opt, Seconds};
use super::{ConfigError, DockerSocket, FileMount, Secret};
use crate::remote::http_client::{Proxy, tls_connector};
use crate::remote::log_artifact::UploadCondition;
use crate::service::environment::Environment;

/// Allowed lengths of a name that is not a URL, in characters.
const NAME_LENGTH: std::ops::RangeInclusive<usize> = 8..=80;

/// Length of a random name, in characters.
const RANDOM_NAME_LENGTH: usize = 20;

/// Returns whether a name is a URL. It may be pre-signed, so it must be treated as a secret.
pub fn is_url(name: &str) -> bool {
    name.starts_with("https://") || name.starts_with("http://")
}

/// The options, merged and checked.
#[derive(Clone, Debug)]
pub struct StartConfig {
    /// The agent's name.
    pub name: String,
    /// The control plane, as `HOST` or `HOST:PORT`.
    pub endpoint: String,
    /// The registration token.
    pub token: Secret,
    /// The scheme of the control plane's URL: `http` or `https`.
    pub scheme: &'static str,
    /// A PEM file of certificate authorities to trust in addition to the machine's.
    pub ca_file: Option<PathBuf>,
    /// The proxy for HTTPS.
    pub proxy: Option<Proxy>,
    /// A script to run when the agent ends.
    pub shutdown_hook: Option<PathBuf>,
    /// The pre-job and the post-job hook.
    pub hooks: JobHooks,
    /// How long each hook may take.
    pub hook_timeout: Duration,
    /// Whether the agent ends after its first job.
    pub disconnect_after_job: bool,
    /// The id of the only job to take; empty if the agent takes any.
    pub job_id: String,
    /// The agent ends after this time without a job, in seconds; 0 for never.
    pub idle_timeout: u64,
    /// How long a running job may go on after the agent was asked to end, in seconds.
    pub interruption_grace_period: u64,
    /// How long the processes of a finished or stopped job have to end.
    pub grace: Duration,
    /// Environment variables of every job.
    pub variables: Vec<EnvVar>,
    /// Files of this machine to mount into containers.
    pub files: Vec<FileMount>,
    /// Whether a job in containers fails if one of `files` is missing.
    pub fail_on_missing_files: bool,
    /// Whether jobs in containers get the engine's socket.
    pub docker_socket: DockerSocket,
    /// When a job's log is uploaded as an artifact.
    pub upload_job_logs: UploadCondition,
    /// Whether processes that a job detached from its shell may outlive it.
    pub keep_daemons: bool,
    /// How long the delivery of a log may go on after the job's end.
    pub log_delivery_timeout: Duration,
    /// The agent's private directory.
    pub state_dir: PathBuf,
    /// Where to install the script that people run over SSH to enter a job.
    pub jump_point: PathBuf,
    /// Warnings for the operator.
    pub warnings: Vec<String>,
    /// All options with their values and origins, one per line.
    pub printed: String,
}

impl StartConfig {
    /// Merges flags, variables, and the file that one of them names, and checks the result.
    pub fn load(flags: &Flags<Start>, environment: &Environment) -> Result<Self, ConfigError> {
        let mut settings = Settings::merge(flags, environment)?;
        refuse_kubernetes(&settings)?;
        let endpoint = endpoint(&settings)?;
        let job_id = settings.get_or_empty(&JOB_ID);
        let disconnect_after_job = settings.get_or_empty(&DISCONNECT_AFTER_JOB);
        if !job_id.is_empty() && !disconnect_after_job {
            return Err(settings.refuse(&JOB_ID.spec, "needs disconnect-after-job"));
        }
        let hook_timeout = settings.get_or_empty(&HOOK_TIMEOUT).duration();
        if hook_timeout.is_zero() {
            return Err(settings.refuse(&HOOK_TIMEOUT.spec, "`0` leaves no time for a hook"));
        }
        let ca_file = settings.get(&CA_FILE);
        if let Some(ca_file) = &ca_file {
            tls_connector(Some(ca_file)).map_err(|_| {
                let ca_file = ca_file.display();
                let why = format!("`{ca_file}` is not a readable file of certificates in PEM");
                settings.refuse(&CA_FILE.spec, why)
            })?;
        }
        let variables = env_vars(&settings.get_or_empty(&ENV_VARS))
            .map_err(|why| settings.refuse(&ENV_VARS.spec, why))?;
        let token = TOKEN.read(&mut settings)?;
        if !token.reveal().bytes().all(|byte| byte.is_ascii_graphic()) {
            let why = "contains characters that are invalid in a token";
            return Err(settings.refuse(TOKEN.set_by(&settings), why));
        }
        let name = name(&settings, environment)?;
        if !is_url(&name) && !name.bytes().all(is_valid_in_names) {
            settings.warnings.push(format!(
                "the name `{name}` contains characters that control planes refuse; use letters, digits and _ / + -"
            ));
        }
        let state_dir = state_dir(&settings, environment);
        let shown_state_dir = state_dir.to_string_lossy().into();
        let no_https: bool = settings.get_or_empty(&NO_HTTPS);
        let seconds = |option: &Opt<Seconds>| u64::from(settings.get_or_empty(option).0);
        Ok(Self {
            name,
            endpoint,
            token,
            scheme: if no_https { "http" } else { "https" },
            ca_file,
            proxy: Proxy::from_env(environment)?,
            shutdown_hook: settings.get(&SHUTDOWN_HOOK_PATH),
            hooks: hooks(&settings, hook_timeout)?,
            hook_timeout,
            disconnect_after_job,
            job_id,
            idle_timeout: seconds(&DISCONNECT_AFTER_IDLE_TIMEOUT),
            interruption_grace_period: seconds(&INTERRUPTION_GRACE_PERIOD),
            grace: settings.get_or_empty(&GRACE_PERIOD).duration(),
            variables,
            files: file_mounts(&settings)?,
            fail_on_missing_files: settings.get_or_empty(&FAIL_ON_MISSING_FILES),
            docker_socket: settings.get_or_empty(&DOCKER_SOCKET),
            upload_job_logs: settings.get_or_empty(&UPLOAD_JOB_LOGS),
            keep_daemons: settings.get_or_empty(&KEEP_DAEMONS),
            log_delivery_timeout: settings.get_or_empty(&LOG_DELIVERY_TIMEOUT).duration(),
            jump_point: jump_point(&settings)?,
            printed: settings.printed(&[(&STATE_DIR.spec, shown_state_dir)]),
            state_dir,
            warnings: settings.warnings,
        })
    }
}

fn refuse_kubernetes(settings: &Settings) -> Result<(), ConfigError> {
    let executor = settings.get(&KUBERNETES_EXECUTOR) == Some(true);
    let executor = Some(&KUBERNETES_EXECUTOR.spec).filter(|_| executor);
    let options = Start::OPTIONS.iter().copied();
    let set = options.filter(|option| option.is_hidden && settings.is_set(option));
    match executor.into_iter().chain(set).next() {
        Some(option) => {
            Err(settings.refuse(option, "this build of the agent can't run jobs in Kubernetes yet"))
        }
        None => Ok(()),
    }
}

fn endpoint(settings: &Settings) -> Result<String, ConfigError> {
    let endpoint = settings.get_or_empty(&ENDPOINT);
    if endpoint.is_empty() {
        let why = "the control plane's host is required";
        return Err(settings.refuse(&ENDPOINT.spec, why));
    }
    if is_endpoint(&endpoint) {
        return Ok(endpoint);
    }
    let why = format!("`{endpoint}` is not HOST or HOST:PORT (no scheme, no path)");
    Err(settings.refuse(&ENDPOINT.spec, why))
}

fn hooks(settings: &Settings, patience: Duration) -> Result<JobHooks, ConfigError> {
    let pre_job = hook_path(settings, &PRE_JOB_HOOK_PATH)?.map(|path| PreJobHook {
        path,
        sourced: settings.get_or_empty(&SOURCE_PRE_JOB_HOOK),
        failure: match settings.get(&FAIL_ON_PRE_JOB_HOOK_ERROR) {
            Some(true) => HookFailure::FailsJobAsAnnounced,
            _ => HookFailure::IsIgnoredAsAnnounced,
        },
        patience: Some(patience),
    });
    let post_job = hook_path(settings, &POST_JOB_HOOK_PATH)?;
    let post_job = post_job.map(|path| PostJobHook { path, patience: Some(patience) });
    Ok(JobHooks { pre_job, post_job })
}

fn is_endpoint(text: &str) -> bool {
    let Ok(authority) = text.parse::<Authority>() else { return false };
    let port = text.strip_prefix(authority.host());
    let is_port = |port: u16| port != 0;
    port == Some("")
        || port.is_some_and(|port| port.starts_with(':'))
            && authority.port_u16().is_some_and(is_port)
}

fn name(settings: &Settings, environment: &Environment) -> Result<String, ConfigError> {
    let (option, name) = match (settings.get(&NAME), settings.get(&NAME_FROM_ENV)) {
        (Some(name), _) => (&NAME.spec, name),
        (None, Some(variable)) => match environment.text(&variable) {
            Some(name) => (&NAME_FROM_ENV.spec, name),
            None => {
                let why = format!("there is no name in the variable `{variable}`");
                return Err(settings.refuse(&NAME_FROM_ENV.spec, why));
            }
        },
        (None, None) => return Ok(random_name()),
    };
    let length = name.chars().count();
    if is_url(&name) || NAME_LENGTH.contains(&length) {
        return Ok(name);
    }
    let (least, most) = (NAME_LENGTH.start(), NAME_LENGTH.end());
    let why =
        format!("`{name}` has {length} characters; a name has {least} to {most}, or is a URL");
    Err(settings.refuse(option, why))
}

/// Returns whether control planes accept `byte` in an agent's name (docs/protocol.md: "Registering").
fn is_valid_in_names(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_/+-".contains(&byte)
}

fn random_name() -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    (0..RANDOM_NAME_LENGTH).map(|_| char::from(LETTERS[fastrand::usize(..LETTERS.len())])).collect()
}

/// Parses `NAME=VALUE` pairs. Of pairs with the same name, the last one counts.
fn env_vars(pairs: &[String]) -> Result<Vec<EnvVar>, String> {
    let mut variables: Vec<EnvVar> = Vec::new();
    for (index, pair) in pairs.iter().enumerate() {
        // The error does not quote the entry, which may be a part of a secret value.
        let (name, value) =
            pair.split_once('=').ok_or_else(|| format!("entry {} is not NAME=VALUE", index + 1))?;
        let name = VariableName::new(name).ok_or_else(|| {
            let entry = index + 1;
            format!(
                "entry {entry} has an invalid variable name (letters, digits and _ only, no digit first)"
            )
        })?;
        variables.retain(|variable| variable.name != name);
        variables.push(EnvVar { name, value: Bytes::copy_from_slice(value.as_bytes()) });
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_names_differ_and_have_an_allowed_length() {
        let [one, two] = [random_name(), random_name()];
        assert_ne!(one, two);
        assert!(NAME_LENGTH.contains(&one.chars().count()));
    }
}
