//! The options of `agent start`.

use std::fmt::{Display, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use actors::job::{EnvVar, VariableName};
use actors::supervisor::{HookFailure, JobHooks, PostJobHook, PreJobHook};
use awc::http::uri::Authority;
use bytes::Bytes;
use serde::de::IntoDeserializer as _;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::fields::{flag, flexible, known_keys};
use super::origins::{OptionsFile, Origins, PREFIX, variable_of};
use super::{
    ConfigError, DEFAULT_GRACE, DockerSocket, FileMount, FileOptions, MASKED, Secret, nearest,
    read_file,
};
use crate::remote::http_client::{Proxy, trusting};
use crate::remote::log_artifact::UploadCondition;
use crate::ssh_access;
use crate::state::StateDir;

/// Variables with this prefix that are no options.
const OTHER_VARIABLES: [&str; 4] = [
    "SEMAPHORE_AGENT_LOG_LEVEL",
    "SEMAPHORE_AGENT_LOG_FILE_PATH",
    "SEMAPHORE_AGENT_LOG_MAX_SIZE",
    "SEMAPHORE_AGENT_LOGS_COMPRESSION_SIZE",
];

/// Options whose variables hold several values, separated by white space.
const LISTS: [&str; 4] = ["env-vars", "files", "kubernetes-allowed-images", "kubernetes-labels"];

/// Options of what this build can't do yet.
const KUBERNETES: [&str; 5] = [
    "kubernetes-pod-spec",
    "kubernetes-allowed-images",
    "kubernetes-pod-start-timeout",
    "kubernetes-labels",
    "kubernetes-default-image",
];

/// How long a name may be, in characters, unless it is a URL.
const NAME_LENGTH: std::ops::RangeInclusive<usize> = 8..=80;

/// The length of a name that the agent makes up.
const RANDOM_NAME: usize = 20;

/// In seconds.
const DEFAULT_HOOK_TIMEOUT: u64 = 600;
const DEFAULT_LOG_DELIVERY_TIMEOUT: u64 = 900;

/// What is so if nothing is set, for [`StartConfig::printed`].
const DEFAULTS: [(&str, &str); 15] = [
    ("no-https", "false"),
    ("hook-timeout", "600"),
    ("fail-on-pre-job-hook-error", "false"),
    ("source-pre-job-hook", "false"),
    ("disconnect-after-job", "false"),
    ("disconnect-after-idle-timeout", "0"),
    ("interruption-grace-period", "0"),
    ("grace-period", "2"),
    ("fail-on-missing-files", "false"),
    ("docker-socket", "always"),
    ("upload-job-logs", "never"),
    ("keep-daemons", "false"),
    ("log-delivery-timeout", "900"),
    ("ssh-jump-point-path", ssh_access::DEFAULT_SCRIPT),
    ("kubernetes-executor", "false"),
];

/// Raw options: what is absent is not set.
#[derive(Clone, Debug, Default, clap::Args, Deserialize, Serialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct StartOptions {
    /// A YAML file with any of these options as keys; --config is the same
    #[arg(long, value_name = "FILE", alias = "config")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config_file: Option<PathBuf>,

    /// Shows the options that are in force, and where each comes from
    #[arg(long)]
    #[serde(skip)]
    pub print_config: bool,

    /// The name of this agent, 8 to 80 characters, or a pre-signed URL that stands for one [default:
    /// 20 random characters]
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,

    /// The variable of the environment that holds the name
    #[arg(long, value_name = "VARIABLE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name_from_env: Option<String>,

    /// The control plane: its host, and its port if that is not the usual one
    #[arg(long, value_name = "HOST")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,

    /// The token that the agent registers with; better not as a flag, which everybody on the machine
    /// can see
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<Secret>,

    /// A file that holds this token
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,

    /// The number of an open descriptor that this token is read from: a way that jobs can't go, unlike a file of the
    /// agent's user
    #[arg(long, value_name = "NUMBER", value_parser = flag::<u32>, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flexible")]
    pub token_fd: Option<u32>,

    /// Speaks plain HTTP to the control plane [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(value_parser = flag::<bool>)]
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flexible")]
    pub no_https: Option<bool>,

    /// Certificate authorities, in PEM, that are trusted besides those of this machine
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,

    /// A script that bash runs when the agent ends; it finds the reason in the variable
    /// `SEMAPHORE_AGENT_SHUTDOWN_REASON`
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shutdown_hook_path: Option<PathBuf>,

    /// A script that bash runs before the commands of every job
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pre_job_hook_path: Option<PathBuf>,

    /// A script that bash runs at the end of every job
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub post_job_hook_path: Option<PathBuf>,

    /// How long each hook may take, in seconds [default: 600]
    #[arg(long, value_name = "SECONDS")]
    #[arg(value_parser = flag::<u64>, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flexible")]
    pub hook_timeout: Option<u64>,

    /// Whether a pre-job hook that fails fails its job [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(value_parser = flag::<bool>)]
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flexible")]
    pub fail_on_pre_job_hook_error: Option<bool>,

    /// Whether the job's own shell runs the pre-job hook [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(value_parser = flag::<bool>)]
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flexible")]
    pub source_pre_job_hook: Option<bool>,

    /// Take one job only, and end after it [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(value_parser = flag::<bool>)]
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flexible")]
    pub disconnect_after_job: Option<bool>,

    /// The only job that the agent is for; needs disconnect-after-job
    #[arg(long, value_name = "ID")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job_id: Option<String>,

    /// End after so many seconds without a job; 0 for never [default: 0]
    #[arg(long, value_name = "SECONDS")]
    #[arg(value_parser = flag::<u64>, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flexible")]
    pub disconnect_after_idle_timeout: Option<u64>,

    /// How long a job may go on after SIGTERM or SIGINT, in seconds [default: 0]
    #[arg(long, value_name = "SECONDS")]
    #[arg(value_parser = flag::<u64>, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flexible")]
    pub interruption_grace_period: Option<u64>,

    /// How long what a job leaves running has to end when it is asked to, in seconds [default: 2]
    #[arg(long, value_name = "SECONDS")]
    #[arg(value_parser = flag::<u64>, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flexible")]
    pub grace_period: Option<u64>,

    /// Variables that every job has in its environment
    #[arg(long, value_name = "NAME=VALUE,...", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env_vars: Option<Vec<String>>,

    /// Files of this machine that are put into containers
    #[arg(long, value_name = "HOST:CONTAINER,...", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub files: Option<Vec<String>>,

    /// Whether a job in containers fails if one of these files is missing [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(value_parser = flag::<bool>)]
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flexible")]
    pub fail_on_missing_files: Option<bool>,

    /// Whether jobs in containers get the socket of the Docker Engine, which makes them root on its
    /// machine: always or never [default: always]
    #[arg(long, value_name = "WHEN", value_parser = flag::<DockerSocket>)]
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flexible")]
    pub docker_socket: Option<DockerSocket>,

    /// When a job's log is kept as an artifact: never, always or when-trimmed, which is when the control
    /// plane has not kept all of it [default: never]
    #[arg(long, value_name = "WHEN", value_parser = flag::<UploadCondition>)]
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flexible")]
    pub upload_job_logs: Option<UploadCondition>,

    /// Leave alone what a job that was not stopped has detached from its shell, such as build daemons
    /// [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(value_parser = flag::<bool>)]
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flexible")]
    pub keep_daemons: Option<bool>,

    /// How long the delivery of a log may take after its job's end, in seconds [default: 900]
    #[arg(long, value_name = "SECONDS")]
    #[arg(value_parser = flag::<u64>, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flexible")]
    pub log_delivery_timeout: Option<u64>,

    /// A private directory for what the agent keeps [default: below the user's state directory,
    /// usually ~/.local/state/semaphore-agent]
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_dir: Option<PathBuf>,

    /// Where the script is put that people start over SSH [default: `/tmp/ssh_jump_point`]
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh_jump_point_path: Option<PathBuf>,

    /// Run jobs in Kubernetes; not in this build yet
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(value_parser = flag::<bool>)]
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flexible")]
    pub kubernetes_executor: Option<bool>,

    #[arg(long, value_name = "CONFIGMAP", hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    kubernetes_pod_spec: Option<String>,

    #[arg(long, value_name = "REGEX,...", value_delimiter = ',', hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    kubernetes_allowed_images: Option<Vec<String>>,

    #[arg(long, value_name = "SECONDS", hide = true)]
    #[arg(value_parser = flag::<u64>, allow_negative_numbers = true)]
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flexible")]
    kubernetes_pod_start_timeout: Option<u64>,

    #[arg(long, value_name = "KEY=VALUE,...", value_delimiter = ',', hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    kubernetes_labels: Option<Vec<String>>,

    #[arg(long, value_name = "IMAGE", hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    kubernetes_default_image: Option<String>,
}

impl FileOptions for StartOptions {
    const SECRETS: &'static [&'static str] = &["token", "env-vars"];
}

impl StartOptions {
    /// What variables say, and what of them says nothing.
    fn from_env() -> Result<(Self, Vec<String>), ConfigError> {
        let keys = known_keys::<StartOptions>();
        let mut options = Map::new();
        let mut warnings = Vec::new();
        let mut names: Vec<_> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
            .filter(|(name, value)| name.starts_with(PREFIX) && !value.is_empty())
            .filter(|(name, _)| !OTHER_VARIABLES.contains(&name.as_str()))
            .collect();
        names.sort();
        for (name, value) in names {
            let Some(key) = keys.iter().find(|key| variable_of(key) == name) else {
                let variables: Vec<_> = keys.iter().map(|key| variable_of(key)).collect();
                let nearest = nearest(&name, variables.iter().map(String::as_str));
                let nearest = nearest.unwrap_or_default();
                warnings
                    .push(format!("{name} is no option of this agent; the nearest is {nearest}"));
                continue;
            };
            let value =
                value.into_string().map_err(|_| ConfigError(format!("{name}: is not UTF-8")))?;
            let value = if LISTS.contains(key) {
                value.split_whitespace().collect()
            } else {
                Value::String(value)
            };
            let alone = Map::from_iter([((*key).to_owned(), value.clone())]);
            Self::deserialize(Value::Object(alone).into_deserializer())
                .map_err(|error: serde_json::Error| ConfigError(format!("{name}: {error}")))?;
            options.insert((*key).to_owned(), value);
        }
        let options = Self::deserialize(Value::Object(options).into_deserializer());
        let options = options.map_err(|error: serde_json::Error| ConfigError(error.to_string()))?;
        Ok((options, warnings))
    }

    /// What is empty in a file is not set: templates of such files name options without a value.
    fn drop_empty(&mut self) {
        for text in [
            &mut self.name,
            &mut self.name_from_env,
            &mut self.endpoint,
            &mut self.job_id,
            &mut self.kubernetes_pod_spec,
            &mut self.kubernetes_default_image,
        ] {
            text.take_if(|text| text.is_empty());
        }
        self.token.take_if(|token| token.reveal().is_empty());
        for path in [
            &mut self.config_file,
            &mut self.token_file,
            &mut self.ca_file,
            &mut self.shutdown_hook_path,
            &mut self.pre_job_hook_path,
            &mut self.post_job_hook_path,
            &mut self.state_dir,
            &mut self.ssh_jump_point_path,
        ] {
            path.take_if(|path| path.as_os_str().is_empty());
        }
        for list in [&mut self.kubernetes_allowed_images, &mut self.kubernetes_labels] {
            list.take_if(|list| list.is_empty());
        }
    }

    /// Its set options, fit to be shown.
    fn shown(&self) -> Map<String, Value> {
        let Ok(Value::Object(mut shown)) = serde_json::to_value(self) else {
            return Map::new();
        };
        for pair in self
            .env_vars
            .iter()
            .flatten()
            .zip(shown.get_mut("env-vars").and_then(Value::as_array_mut).into_iter().flatten())
        {
            let (given, masked) = pair;
            let name = given.split_once('=').map_or("", |(name, _)| name);
            *masked = format!("{name}={MASKED}").into();
        }
        // It may be pre-signed.
        if let Some(name) = shown.get_mut("name")
            && name.as_str().is_some_and(is_url)
        {
            *name = MASKED.into();
        }
        shown
    }
}

/// A name that is one may be pre-signed: a secret then.
pub fn is_url(name: &str) -> bool {
    name.starts_with("https://") || name.starts_with("http://")
}

/// The options, merged and checked.
#[derive(Clone, Debug)]
pub struct StartConfig {
    /// The agent's name.
    pub name: String,
    /// Host and perhaps port of the control plane.
    pub endpoint: String,
    /// What the agent registers with.
    pub token: Secret,
    /// `http` or `https`.
    pub scheme: &'static str,
    /// Trusted besides the machine's own authorities.
    pub ca_file: Option<PathBuf>,
    /// For HTTPS.
    pub proxy: Option<Proxy>,
    /// Runs when the agent ends.
    pub shutdown_hook: Option<PathBuf>,
    /// What is added to every job.
    pub hooks: JobHooks,
    /// How long each hook may take.
    pub hook_timeout: Duration,
    /// Whether the agent is for one job only.
    pub disconnect_after_job: bool,
    /// The only job that it is for; empty for any.
    pub job_id: String,
    /// In seconds; 0 for never.
    pub idle_timeout: u64,
    /// In seconds.
    pub interruption_grace_period: u64,
    /// How long what a job leaves running has to end.
    pub grace: Duration,
    /// What every job has in its environment.
    pub variables: Vec<EnvVar>,
    /// What containers get of this machine's files.
    pub files: Vec<FileMount>,
    /// Whether a missing one of these fails a job.
    pub fail_on_missing_files: bool,
    /// Whether jobs in containers get the engine's socket.
    pub docker_socket: DockerSocket,
    /// When a job's log is kept as an artifact.
    pub upload_job_logs: UploadCondition,
    /// Whether what a job detached from its shell outlives it.
    pub keep_daemons: bool,
    /// How long the delivery of a log may take after its job's end.
    pub log_delivery_timeout: Duration,
    /// The agent's private directory.
    pub state_dir: PathBuf,
    /// Where the script is put that people start over SSH.
    pub jump_point: PathBuf,
    /// What the operator may want to know.
    pub warnings: Vec<String>,
    /// Every option, its value, and where that comes from, a line each.
    pub printed: String,
}

impl StartConfig {
    /// Merges flags, variables, and the file that one of them names.
    pub fn load(mut flags: StartOptions) -> Result<Self, ConfigError> {
        // An empty flag is a list of one empty text.
        for list in [&mut flags.env_vars, &mut flags.files].into_iter().flatten() {
            if *list == [""] {
                list.clear();
            }
        }
        let (variables, warnings) = StartOptions::from_env()?;
        let path = flags.config_file.clone().or_else(|| variables.config_file.clone());
        let (mut file, text) = match &path {
            Some(path) => read_file::<StartOptions>(path)?,
            None => Default::default(),
        };
        let place = OptionsFile { path: path.unwrap_or_default(), text };
        file.drop_empty();
        let origins = Origins {
            flags: flags.shown(),
            variables: variables.shown(),
            file: file.shown(),
            place,
        };
        if file.config_file.is_some() {
            let mut origins = origins;
            (origins.flags, origins.variables) = Default::default();
            return Err(origins.refuse("config-file", "can't be set in the file itself"));
        }
        // A token given in one way is not to be mixed with one given in another, nor a name.
        let mut options = flags;
        for mut layer in [variables, file] {
            if options.token.is_some() || options.token_file.is_some() || options.token_fd.is_some()
            {
                (layer.token, layer.token_file, layer.token_fd) = (None, None, None);
            }
            if options.name.is_some() || options.name_from_env.is_some() {
                (layer.name, layer.name_from_env) = (None, None);
            }
            fill!(options from layer;
                config_file, name, name_from_env, endpoint, token, token_file, token_fd, no_https, ca_file,
                shutdown_hook_path, pre_job_hook_path, post_job_hook_path, hook_timeout,
                fail_on_pre_job_hook_error, source_pre_job_hook, disconnect_after_job, job_id,
                disconnect_after_idle_timeout, interruption_grace_period, grace_period, env_vars, files,
                fail_on_missing_files, docker_socket, upload_job_logs, keep_daemons, log_delivery_timeout, state_dir,
                ssh_jump_point_path, kubernetes_executor, kubernetes_pod_spec,
                kubernetes_allowed_images, kubernetes_pod_start_timeout, kubernetes_labels,
                kubernetes_default_image,
            );
        }
        let mut config = Self::validate(options, warnings, &origins)?;
        if !is_url(&config.name) && !config.name.bytes().all(is_usual_in_names) {
            config.warnings.push(format!(
                "the name `{}` has characters that control planes refuse: letters, digits and _ / + - are usual",
                config.name
            ));
        }
        Ok(config)
    }

    fn validate(
        options: StartOptions,
        warnings: Vec<String>,
        origins: &Origins,
    ) -> Result<Self, ConfigError> {
        let shown = options.shown();
        let kubernetes = KUBERNETES.iter().find(|key| shown.contains_key(**key));
        let executor = Some("kubernetes-executor");
        let executor = executor.filter(|_| options.kubernetes_executor == Some(true));
        if let Some(key) = kubernetes.copied().or(executor) {
            let why = "this build of the agent can't run jobs in Kubernetes yet";
            return Err(origins.refuse(key, why));
        }
        let Some(endpoint) = options.endpoint.filter(|endpoint| !endpoint.is_empty()) else {
            return Err(origins.refuse("endpoint", "the host of the control plane is needed"));
        };
        if !is_endpoint(&endpoint) {
            let why = format!("`{endpoint}` is not HOST or HOST:PORT, without a scheme and a path");
            return Err(origins.refuse("endpoint", why));
        }
        let job_id = options.job_id.unwrap_or_default();
        let disconnect_after_job = options.disconnect_after_job.unwrap_or(false);
        if !job_id.is_empty() && !disconnect_after_job {
            return Err(origins.refuse("job-id", "needs disconnect-after-job"));
        }
        let jump_point =
            options.ssh_jump_point_path.unwrap_or_else(|| ssh_access::DEFAULT_SCRIPT.into());
        if !jump_point.is_absolute() {
            let why = format!("`{}` is not an absolute path", jump_point.display());
            return Err(origins.refuse("ssh-jump-point-path", why));
        }
        let files = options.files.unwrap_or_default();
        let files: Result<_, String> = files.iter().map(|pair| pair.trim().parse()).collect();
        if options.hook_timeout == Some(0) {
            return Err(origins.refuse("hook-timeout", "`0` leaves no time for a hook"));
        }
        let seconds = |given: Option<u64>, default| Duration::from_secs(given.unwrap_or(default));
        let hook_timeout = seconds(options.hook_timeout, DEFAULT_HOOK_TIMEOUT);
        let pre_job = match options.pre_job_hook_path {
            Some(path) => Some(PreJobHook {
                path: for_shell(origins, "pre-job-hook-path", path)?,
                sourced: options.source_pre_job_hook.unwrap_or(false),
                failure: match options.fail_on_pre_job_hook_error {
                    Some(true) => HookFailure::FailsJobAsAnnounced,
                    _ => HookFailure::IsIgnoredAsAnnounced,
                },
                patience: Some(hook_timeout),
            }),
            None => None,
        };
        let post_job = match options.post_job_hook_path {
            Some(path) => Some(PostJobHook {
                path: for_shell(origins, "post-job-hook-path", path)?,
                patience: Some(hook_timeout),
            }),
            None => None,
        };
        if let Some(ca_file) = &options.ca_file {
            trusting(Some(ca_file)).map_err(|_| {
                let ca_file = ca_file.display();
                let why = format!("`{ca_file}` is no readable file of certificates in PEM");
                origins.refuse("ca-file", why)
            })?;
        }
        let home = std::env::home_dir().unwrap_or_default();
        let state_dir = options.state_dir.unwrap_or_else(|| StateDir::default_path(&home));
        let (token, warning) = token(options.token, options.token_file, options.token_fd, origins)?;
        let mut warnings = warnings;
        warnings.extend(warning);
        Ok(Self {
            name: name(options.name, options.name_from_env, origins)?,
            endpoint,
            token,
            scheme: if options.no_https.unwrap_or(false) { "http" } else { "https" },
            ca_file: options.ca_file,
            proxy: Proxy::from_env().map_err(ConfigError)?,
            shutdown_hook: options.shutdown_hook_path,
            hooks: JobHooks { pre_job, post_job },
            hook_timeout,
            disconnect_after_job,
            job_id,
            idle_timeout: options.disconnect_after_idle_timeout.unwrap_or(0),
            interruption_grace_period: options.interruption_grace_period.unwrap_or(0),
            grace: options.grace_period.map_or(DEFAULT_GRACE, Duration::from_secs),
            variables: env_vars(&options.env_vars.unwrap_or_default())
                .map_err(|why| origins.refuse("env-vars", why))?,
            files: files.map_err(|why| origins.refuse("files", why))?,
            fail_on_missing_files: options.fail_on_missing_files.unwrap_or(false),
            docker_socket: options.docker_socket.unwrap_or_default(),
            upload_job_logs: options.upload_job_logs.unwrap_or_default(),
            keep_daemons: options.keep_daemons.unwrap_or(false),
            log_delivery_timeout: seconds(
                options.log_delivery_timeout,
                DEFAULT_LOG_DELIVERY_TIMEOUT,
            ),
            printed: printed(shown, origins, &state_dir),
            state_dir,
            jump_point,
            warnings,
        })
    }
}

/// In the words of a configuration file, with origins as comments.
fn printed(mut merged: Map<String, Value>, origins: &Origins, state_dir: &Path) -> String {
    merged.entry("state-dir").or_insert_with(|| state_dir.to_string_lossy().into());
    let mut text = String::new();
    for key in known_keys::<StartOptions>() {
        let default = DEFAULTS.iter().find(|(name, _)| *name == key);
        let value = match (merged.get(key), default) {
            (Some(value), _) => value.to_string(),
            (None, Some((_, default))) => (*default).to_owned(),
            (None, None) => continue,
        };
        // Fails only if writing to a string does.
        let _ = writeln!(text, "{key}: {value} # {}", origins.of(key));
    }
    text
}

fn is_endpoint(text: &str) -> bool {
    let Ok(authority) = text.parse::<Authority>() else { return false };
    let port = text.strip_prefix(authority.host());
    let is_port = |port: u16| port != 0;
    port == Some("")
        || port.is_some_and(|port| port.starts_with(':'))
            && authority.port_u16().is_some_and(is_port)
}

/// As the job's shell, which is in another directory, finds it.
fn for_shell(origins: &Origins, key: &str, path: PathBuf) -> Result<String, ConfigError> {
    let path = std::path::absolute(&path).unwrap_or(path);
    let path = path.into_os_string().into_string();
    path.map_err(|path| origins.refuse(key, format!("`{}` is not UTF-8", path.display())))
}

fn name(
    given: Option<String>,
    variable: Option<String>,
    origins: &Origins,
) -> Result<String, ConfigError> {
    let (key, name) = match (given, variable) {
        (Some(name), _) => ("name", name),
        (None, Some(variable)) => match std::env::var(&variable) {
            Ok(name) if !name.is_empty() => ("name-from-env", name),
            _ => {
                let why = format!("there is no name in the variable `{variable}`");
                return Err(origins.refuse("name-from-env", why));
            }
        },
        (None, None) => return Ok(random_name()),
    };
    let length = name.chars().count();
    if is_url(&name) || NAME_LENGTH.contains(&length) {
        return Ok(name);
    }
    let (least, most) = (NAME_LENGTH.start(), NAME_LENGTH.end());
    let why = format!("`{name}` has {length} characters; {least} to {most}, or a URL, are needed");
    Err(origins.refuse(key, why))
}

/// Whether control planes take this in an agent's name (PROTOCOL: `^[A-Za-z0-9_/+-]{8,80}$`).
fn is_usual_in_names(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_/+-".contains(&byte)
}

fn random_name() -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    (0..RANDOM_NAME).map(|_| char::from(LETTERS[fastrand::usize(..LETTERS.len())])).collect()
}

fn token(
    given: Option<Secret>,
    file: Option<PathBuf>,
    descriptor: Option<u32>,
    origins: &Origins,
) -> Result<(Secret, Option<String>), ConfigError> {
    let mut warning = None;
    let (key, token) = match (given, file, descriptor) {
        (Some(_), Some(_), None) => {
            let why = "token is set too; one of these two is needed";
            return Err(origins.refuse("token-file", why));
        }
        (None, None, Some(number)) => {
            let token = Secret::read_descriptor(number)
                .map_err(|error| origins.refuse("token-fd", format!("`{number}`: {error}")))?;
            ("token-fd", token)
        }
        (_, _, Some(_)) => {
            let why = "token or token-file is set too; one of these is needed";
            return Err(origins.refuse("token-fd", why));
        }
        (None, None, None) => {
            return Err(ConfigError(
                "no token: set SEMAPHORE_AGENT_TOKEN, or name a file with --token-file".to_owned(),
            ));
        }
        (Some(token), None, None) => ("token", token),
        (None, Some(path), None) => {
            let refuse = |why: &dyn Display| {
                origins.refuse("token-file", format!("`{}`: {why}", path.display()))
            };
            let (token, about_file) = Secret::read(&path).map_err(|error| refuse(&error))?;
            warning = about_file;
            if token.reveal().is_empty() {
                return Err(refuse(&"there is no token in it"));
            }
            ("token-file", token)
        }
    };
    if token.reveal().is_empty() {
        return Err(origins.refuse(key, "is empty"));
    }
    if !token.reveal().bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(origins.refuse(key, "has characters that no token has"));
    }
    Ok((token, warning))
}

/// The value may hold what no flag, and no variable, could hold otherwise.
fn env_vars(pairs: &[String]) -> Result<Vec<EnvVar>, String> {
    let mut variables: Vec<EnvVar> = Vec::new();
    for (index, pair) in pairs.iter().enumerate() {
        // Not shown: a part of a value may have got here.
        let (name, value) =
            pair.split_once('=').ok_or_else(|| format!("entry {} is not NAME=VALUE", index + 1))?;
        let name = VariableName::new(name).ok_or_else(|| {
            let entry = index + 1;
            format!(
                "entry {entry} has no name of a variable: letters, digits and _ only, no digit first"
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
    fn every_key_has_a_field_and_every_default_a_key() {
        let keys = known_keys::<StartOptions>();
        assert!(keys.len() > 30 && keys.contains(&"log-delivery-timeout"), "{keys:?}");
        for (key, _) in DEFAULTS {
            assert!(keys.contains(&key), "{key}");
        }
    }

    #[test]
    fn names_are_random_and_fit() {
        let [one, two] = [random_name(), random_name()];
        assert_ne!(one, two);
        assert!(NAME_LENGTH.contains(&one.chars().count()));
    }
}
