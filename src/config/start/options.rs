//! The table of the options of `agent start`.

use std::path::PathBuf;

use serde_json::Value;

use super::is_url;
use crate::config::MASKED;
use crate::config::common::{
    CONFIG_FILE, DOCKER_SOCKET, FILES, GRACE_PERIOD, INTERRUPTION_GRACE_PERIOD,
    SSH_JUMP_POINT_PATH, STATE_DIR,
};
use crate::config::layers::OptionSet;
use crate::config::options::{Opt, Seconds, Spec};
use crate::config::secret::WaysToSecret;
use crate::remote::log_artifact::UploadCondition;

pub(super) const NAME: Opt<String> = Opt::new(
    "name",
    "NAME",
    "The name of this agent, 8 to 80 characters, or a pre-signed URL that stands for one",
)
.default_in_words("20 random characters")
.group("name")
.masked(masked_url)
.example("agent-on-this-machine");

pub(super) const NAME_FROM_ENV: Opt<String> =
    Opt::new("name-from-env", "VARIABLE", "The variable of the environment that holds the name")
        .group("name")
        .example("AGENT_NAME");

pub(super) const ENDPOINT: Opt<String> = Opt::new(
    "endpoint",
    "HOST",
    "The control plane: its host, and its port if that is not the usual one; needed",
)
.set_in_example("example.semaphoreci.com");

pub(super) const TOKEN: WaysToSecret = WaysToSecret {
    what: "token",
    itself: Opt::new(
        "token",
        "TOKEN",
        "The token that the agent registers with; better not as a flag, which everybody on the machine can see",
    )
    .group("token")
    .example("..."),
    in_file: Opt::new("token-file", "FILE", "A file that holds this token")
        .group("token")
        .set_in_example("/etc/semaphore-agent/token"),
    by_descriptor: Opt::new(
        "token-fd",
        "NUMBER",
        "The number of an open descriptor that this token is read from; jobs can't read it, unlike a file of the agent's user",
    )
    .group("token")
    .example("3"),
};

pub(super) const NO_HTTPS: Opt<bool> =
    Opt::new("no-https", "BOOL", "Speak plain HTTP to the control plane").default("false");

pub(super) const CA_FILE: Opt<PathBuf> = Opt::new(
    "ca-file",
    "FILE",
    "Certificate authorities, in PEM, that are trusted besides those of this machine",
)
.example("/etc/semaphore-agent/ca.pem");

pub(super) const SHUTDOWN_HOOK_PATH: Opt<PathBuf> = Opt::new(
    "shutdown-hook-path",
    "FILE",
    "A script that bash runs when the agent ends; it finds the reason in the variable SEMAPHORE_AGENT_SHUTDOWN_REASON",
)
.example("/etc/semaphore-agent/shutdown-hook");

pub(super) const PRE_JOB_HOOK_PATH: Opt<PathBuf> = Opt::new(
    "pre-job-hook-path",
    "FILE",
    "A script that bash runs before the commands of every job",
)
.example("/etc/semaphore-agent/pre-job-hook");

pub(super) const POST_JOB_HOOK_PATH: Opt<PathBuf> =
    Opt::new("post-job-hook-path", "FILE", "A script that bash runs at the end of every job")
        .example("/etc/semaphore-agent/post-job-hook");

pub(super) const HOOK_TIMEOUT: Opt<Seconds> =
    Opt::new("hook-timeout", "SECONDS", "How long each hook may take, in seconds").default("600");

pub(super) const FAIL_ON_PRE_JOB_HOOK_ERROR: Opt<bool> = Opt::new(
    "fail-on-pre-job-hook-error",
    "BOOL",
    "Whether a pre-job hook that fails fails its job",
)
.default("false");

pub(super) const SOURCE_PRE_JOB_HOOK: Opt<bool> = Opt::new(
    "source-pre-job-hook",
    "BOOL",
    "Whether the job's own shell runs the pre-job hook, so that what it sets stays set",
)
.default("false");

pub(super) const DISCONNECT_AFTER_JOB: Opt<bool> =
    Opt::new("disconnect-after-job", "BOOL", "Take one job only, and end after it")
        .default("false");

pub(super) const JOB_ID: Opt<String> =
    Opt::new("job-id", "ID", "The only job that the agent is for; needs disconnect-after-job")
        .example("5c2e7b1a-0000-0000-0000-000000000000");

pub(super) const DISCONNECT_AFTER_IDLE_TIMEOUT: Opt<Seconds> = Opt::new(
    "disconnect-after-idle-timeout",
    "SECONDS",
    "End after so many seconds without a job; 0 for never",
)
.default("0");

pub(super) const ENV_VARS: Opt<Vec<String>> = Opt::new(
    "env-vars",
    "NAME=VALUE,...",
    "Variables that every job has in its environment, as NAME=VALUE",
)
.masked(masked_values)
.set_in_example("[]");

pub(super) const FAIL_ON_MISSING_FILES: Opt<bool> = Opt::new(
    "fail-on-missing-files",
    "BOOL",
    "Whether a job in containers fails if one of the files for containers is missing",
)
.default("false");

pub(super) const UPLOAD_JOB_LOGS: Opt<UploadCondition> = Opt::new(
    "upload-job-logs",
    "WHEN",
    "When a job's log is kept as an artifact: never, always or when-trimmed, which is when the control plane has not kept all of it",
)
.default("never");

pub(super) const KEEP_DAEMONS: Opt<bool> = Opt::new(
    "keep-daemons",
    "BOOL",
    "Leave alone what a job that was not stopped has detached from its shell, such as build daemons",
)
.default("false");

pub(super) const LOG_DELIVERY_TIMEOUT: Opt<Seconds> = Opt::new(
    "log-delivery-timeout",
    "SECONDS",
    "How long the delivery of a log may take after its job's end, in seconds",
)
.default("900");

pub(super) const KUBERNETES_EXECUTOR: Opt<bool> =
    Opt::new("kubernetes-executor", "BOOL", "Run jobs in Kubernetes; not in this build yet")
        .default("false");

pub(super) const KUBERNETES_POD_SPEC: Opt<String> =
    Opt::new("kubernetes-pod-spec", "CONFIGMAP", "Not in this build yet").example("...").hidden();

pub(super) const KUBERNETES_ALLOWED_IMAGES: Opt<Vec<String>> =
    Opt::new("kubernetes-allowed-images", "REGEX,...", "Not in this build yet")
        .example("[\".*\"]")
        .hidden();

pub(super) const KUBERNETES_POD_START_TIMEOUT: Opt<Seconds> =
    Opt::new("kubernetes-pod-start-timeout", "SECONDS", "Not in this build yet")
        .example("300")
        .hidden();

pub(super) const KUBERNETES_LABELS: Opt<Vec<String>> =
    Opt::new("kubernetes-labels", "KEY=VALUE,...", "Not in this build yet")
        .example("[team=ci]")
        .hidden();

pub(super) const KUBERNETES_DEFAULT_IMAGE: Opt<String> =
    Opt::new("kubernetes-default-image", "IMAGE", "Not in this build yet").example("...").hidden();

/// The options of `agent start`.
#[derive(Clone, Debug)]
pub struct Start;

impl OptionSet for Start {
    const HAS_FILE: bool = true;
    const OPTIONS: &'static [&'static Spec] = &[
        &CONFIG_FILE.spec,
        &NAME.spec,
        &NAME_FROM_ENV.spec,
        &ENDPOINT.spec,
        &TOKEN.itself.spec,
        &TOKEN.in_file.spec,
        &TOKEN.by_descriptor.spec,
        &NO_HTTPS.spec,
        &CA_FILE.spec,
        &SHUTDOWN_HOOK_PATH.spec,
        &PRE_JOB_HOOK_PATH.spec,
        &POST_JOB_HOOK_PATH.spec,
        &HOOK_TIMEOUT.spec,
        &FAIL_ON_PRE_JOB_HOOK_ERROR.spec,
        &SOURCE_PRE_JOB_HOOK.spec,
        &DISCONNECT_AFTER_JOB.spec,
        &JOB_ID.spec,
        &DISCONNECT_AFTER_IDLE_TIMEOUT.spec,
        &INTERRUPTION_GRACE_PERIOD.spec,
        &GRACE_PERIOD.spec,
        &ENV_VARS.spec,
        &FILES.spec,
        &FAIL_ON_MISSING_FILES.spec,
        &DOCKER_SOCKET.spec,
        &UPLOAD_JOB_LOGS.spec,
        &KEEP_DAEMONS.spec,
        &LOG_DELIVERY_TIMEOUT.spec,
        &STATE_DIR.spec,
        &SSH_JUMP_POINT_PATH.spec,
        &KUBERNETES_EXECUTOR.spec,
        &KUBERNETES_POD_SPEC.spec,
        &KUBERNETES_ALLOWED_IMAGES.spec,
        &KUBERNETES_POD_START_TIMEOUT.spec,
        &KUBERNETES_LABELS.spec,
        &KUBERNETES_DEFAULT_IMAGE.spec,
    ];
}

/// Hides a URL, which may be pre-signed.
fn masked_url(value: &Value) -> Value {
    if value.as_str().is_some_and(is_url) { MASKED.into() } else { value.clone() }
}

/// Hides the values of NAME=VALUE.
fn masked_values(value: &Value) -> Value {
    let name = |pair: &Value| pair.as_str()?.split_once('=').map(|(name, _)| name.to_owned());
    let masked = |pair: &Value| format!("{}={MASKED}", name(pair).unwrap_or_default());
    value.as_array().into_iter().flatten().map(masked).collect()
}
