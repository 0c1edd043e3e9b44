//! The definitions of the options of `agent serve`.

use std::path::PathBuf;

use crate::config::common::{
    CONFIG_FILE, DOCKER_SOCKET, FILES, GRACE_PERIOD, INTERRUPTION_GRACE_PERIOD,
    SSH_JUMP_POINT_PATH, STATE_DIR,
};
use crate::config::layers::OptionSet;
use crate::config::option::{AtLeastOne, Opt, Seconds, Spec};
use crate::config::secret::SecretOptions;

pub(super) const SECRET: SecretOptions = SecretOptions {
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

pub(super) const HOST: Opt<String> =
    Opt::new("host", "HOST", "The address to listen on").default("0.0.0.0");

pub(super) const PORT: Opt<u16> =
    Opt::new("port", "PORT", "The port to listen on; 0 for any free port").default("8000");

pub(super) const TLS_CERT_PATH: Opt<PathBuf> = Opt::new("tls-cert-path", "FILE", "The certificate, in PEM")
    .default_in_words("server.crt in the working directory; a self-signed certificate if neither server.crt nor server.key exists")
    .example("/etc/semaphore-agent/server.crt");

pub(super) const TLS_KEY_PATH: Opt<PathBuf> =
    Opt::new("tls-key-path", "FILE", "The certificate's private key, in PEM")
        .default_in_words("server.key in the working directory")
        .example("/etc/semaphore-agent/server.key");

pub(super) const STATSD_HOST: Opt<String> = Opt::new(
    "statsd-host",
    "HOST",
    "The host of a DogStatsD server; metrics need both statsd-host and statsd-port",
)
.example("127.0.0.1");

pub(super) const STATSD_PORT: Opt<u16> =
    Opt::new("statsd-port", "PORT", "The UDP port of the DogStatsD server").example("8125");

pub(super) const STATSD_NAMESPACE: Opt<String> =
    Opt::new("statsd-namespace", "NAMESPACE", "The prefix of all metric names")
        .default("agent.prod");

pub(super) const CALLBACK_RETRY_ATTEMPTS: Opt<u32> = Opt::new(
    "callback-retry-attempts",
    "NUMBER",
    "How many times to try a callback, a second apart",
)
.default("300");

pub(super) const PRE_JOB_HOOK_PATH: Opt<PathBuf> = Opt::new(
    "pre-job-hook-path",
    "FILE",
    "A script that every job's shell sources before the first command; if the script fails, so does the job",
)
.example("/etc/semaphore-agent/pre-job-hook");

pub(super) const EXPOSE_KVM_DEVICE: Opt<bool> =
    Opt::new("expose-kvm-device", "BOOL", "Whether containers get /dev/kvm").default("true");

pub(super) const ARCHIVE_TIMEOUT: Opt<Seconds> = Opt::new(
    "archive-timeout",
    "SECONDS",
    "How long a finished job waits for an archivator to fetch its log, in seconds; at most a minute once the agent is asked to end",
)
.default("3600");

pub(super) const MAX_CONNECTIONS_PER_CLIENT: Opt<AtLeastOne> = Opt::new(
    "max-connections-per-client",
    "NUMBER",
    "How many connections one address may have; a platform behind one proxy counts as one address",
)
.default_in_words("no separate limit")
.example("1000");

pub(super) const MAX_BODY_SIZE: Opt<usize> =
    Opt::new("max-body-size", "BYTES", "The largest request body, in bytes").default("33554432");

pub(super) const SINGLE_JOB: Opt<bool> =
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
