//! The definitions of the options of `agent start`.

use std::path::PathBuf;

use serde_json::Value;

use super::is_url;
use crate::config::MASKED;
use crate::config::common::{
    CONFIG_FILE, DOCKER_SOCKET, FILES, GRACE_PERIOD, INTERRUPTION_GRACE_PERIOD,
    SSH_JUMP_POINT_PATH, STATE_DIR,
};
use crate::config::layers::OptionSet;
use crate::config::option::{Opt, Seconds, Spec};
use crate::config::secret::SecretOptions;
use crate::remote::log_artifact::UploadCondition;

pub(super) const NAME: Opt<String> = Opt::new(
    "name",
    "NAME",
    "The agent's name: 8 to 80 characters, or a pre-signed URL in place of one",
)
.default_in_words("20 random characters")
.group("name")
.masked(masked_url)
.example("agent-on-this-machine");

pub(super) const NAME_FROM_ENV: Opt<String> =
    Opt::new("name-from-env", "VARIABLE", "An environment variable that holds the agent's name")
        .group("name")
        .example("AGENT_NAME");

pub(super) const ENDPOINT: Opt<String> = Opt::new(
    "endpoint",
    "HOST",
    "The control plane's host, and its port if that is not the default one; required",
)
.set_in_example("example.semaphoreci.com");

pub(super) const TOKEN: SecretOptions = SecretOptions {
    name: "token",
    value: Opt::new(
        "token",
        "TOKEN",
        "The registration token; prefer a file or a descriptor, as every user of the machine can see flags",
    )
    .group("token")
    .example("..."),
    file: Opt::new("token-file", "FILE", "A file that holds the registration token")
        .group("token")
        .set_in_example("/etc/semaphore-agent/token"),
    descriptor: Opt::new(
        "token-fd",
        "NUMBER",
        "The number of an open file descriptor from which to read the registration token; jobs can't read it, unlike a file of the agent's user",
    )
    .group("token")
    .example("3"),
};

pub(super) const NO_HTTPS: Opt<bool> =
    Opt::new("no-https", "BOOL", "Use plain HTTP for the control plane").default("false");

pub(super) const CA_FILE: Opt<PathBuf> = Opt::new(
    "ca-file",
    "FILE",
    "Certificate authorities, in PEM, to trust in addition to the machine's",
)
.example("/etc/semaphore-agent/ca.pem");

pub(super) const SHUTDOWN_HOOK_PATH: Opt<PathBuf> = Opt::new(
    "shutdown-hook-path",
    "FILE",
    "A script that bash runs when the agent ends; the variable SEMAPHORE_AGENT_SHUTDOWN_REASON holds the reason",
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

pub(super) const FAIL_ON_PRE_JOB_HOOK_ERROR: Opt<bool> =
    Opt::new("fail-on-pre-job-hook-error", "BOOL", "Whether a failing pre-job hook fails the job")
        .default("false");

pub(super) const SOURCE_PRE_JOB_HOOK: Opt<bool> = Opt::new(
    "source-pre-job-hook",
    "BOOL",
    "Whether the job's own shell sources the pre-job hook, so that the job sees variables and functions from it",
)
.default("false");

pub(super) const DISCONNECT_AFTER_JOB: Opt<bool> =
    Opt::new("disconnect-after-job", "BOOL", "Take one job only, and end after it")
        .default("false");

pub(super) const JOB_ID: Opt<String> =
    Opt::new("job-id", "ID", "The id of the only job to take; needs disconnect-after-job")
        .example("5c2e7b1a-0000-0000-0000-000000000000");

pub(super) const DISCONNECT_AFTER_IDLE_TIMEOUT: Opt<Seconds> = Opt::new(
    "disconnect-after-idle-timeout",
    "SECONDS",
    "End after this many seconds without a job; 0 for never",
)
.default("0");

pub(super) const ENV_VARS: Opt<Vec<String>> =
    Opt::new("env-vars", "NAME=VALUE,...", "Environment variables of every job, as NAME=VALUE")
        .masked(masked_values)
        .set_in_example("[]");

pub(super) const FAIL_ON_MISSING_FILES: Opt<bool> = Opt::new(
    "fail-on-missing-files",
    "BOOL",
    "Whether a job in containers fails if one of the files to mount is missing",
)
.default("false");

pub(super) const UPLOAD_JOB_LOGS: Opt<UploadCondition> = Opt::new(
    "upload-job-logs",
    "WHEN",
    "When to upload a job's log as an artifact: never, always, or when-trimmed (only if the control plane has not kept all of it)",
)
.default("never");

pub(super) const KEEP_DAEMONS: Opt<bool> = Opt::new(
    "keep-daemons",
    "BOOL",
    "Whether processes that a job has detached from its shell, such as build daemons, may outlive it; those of a stopped job never do",
)
.default("false");

pub(super) const LOG_DELIVERY_TIMEOUT: Opt<Seconds> = Opt::new(
    "log-delivery-timeout",
    "SECONDS",
    "How long the delivery of a log may go on after the job's end, in seconds",
)
.default("900");

pub(super) const KUBERNETES_EXECUTOR: Opt<bool> = Opt::new(
    "kubernetes-executor",
    "BOOL",
    "Run jobs in Kubernetes; not supported by this build yet",
)
.default("false");

pub(super) const KUBERNETES_POD_SPEC: Opt<String> =
    Opt::new("kubernetes-pod-spec", "CONFIGMAP", "Not supported by this build yet")
        .example("...")
        .hidden();

pub(super) const KUBERNETES_ALLOWED_IMAGES: Opt<Vec<String>> =
    Opt::new("kubernetes-allowed-images", "REGEX,...", "Not supported by this build yet")
        .example("[\".*\"]")
        .hidden();

pub(super) const KUBERNETES_POD_START_TIMEOUT: Opt<Seconds> =
    Opt::new("kubernetes-pod-start-timeout", "SECONDS", "Not supported by this build yet")
        .example("300")
        .hidden();

pub(super) const KUBERNETES_LABELS: Opt<Vec<String>> =
    Opt::new("kubernetes-labels", "KEY=VALUE,...", "Not supported by this build yet")
        .example("[team=ci]")
        .hidden();

pub(super) const KUBERNETES_DEFAULT_IMAGE: Opt<String> =
    Opt::new("kubernetes-default-image", "IMAGE", "Not supported by this build yet")
        .example("...")
        .hidden();

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
        &TOKEN.value.spec,
        &TOKEN.file.spec,
        &TOKEN.descriptor.spec,
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

/// Hides a value that is a URL: a pre-signed one is a secret.
fn masked_url(value: &Value) -> Value {
    if value.as_str().is_some_and(is_url) { MASKED.into() } else { value.clone() }
}

/// Hides the value in each `NAME=VALUE`.
fn masked_values(value: &Value) -> Value {
    let name = |pair: &Value| pair.as_str()?.split_once('=').map(|(name, _)| name.to_owned());
    let masked = |pair: &Value| format!("{}={MASKED}", name(pair).unwrap_or_default());
    value.as_array().into_iter().flatten().map(masked).collect()
}
