//! Credentials for registries: those of the job, or those in the Docker configuration of the agent's user.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use actors::errors::{Cause, WithCauses};
use actors::job::containers::RegistryCredentials;
use actors::ports::StepError;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bollard::auth::DockerCredentials;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use crate::executors::docker::engine::Engine;
use crate::os::programs::stdout_of;

/// The registry of images whose name contains no registry.
const DOCKER_HUB: &str = "docker.io";

/// Other names of Docker Hub.
const DOCKER_HUB_ALIASES: [&str; 4] =
    ["index.docker.io", "registry-1.docker.io", "hub.docker.com", "registry.hub.docker.com"];

/// The key of Docker Hub in the Docker configuration and in requests to engines.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// How long `aws` or a credential helper may take.
const PROGRAM_PATIENCE: Duration = Duration::from_mins(1);

/// How much of a program's standard error an error message shows, in bytes.
const SHOWN: usize = 2000;

/// The username and the password for one registry.
#[derive(Clone, PartialEq, Eq)]
pub struct RegistryLogin {
    registry: String,
    username: String,
    password: String,
}

/// Leaves out the password.
impl fmt::Debug for RegistryLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.username, self.registry)
    }
}

/// The body of the engine's request `POST /auth`, which tries a login.
#[derive(Serialize)]
struct AuthRequest<'a> {
    username: &'a str,
    password: &'a str,
    serveraddress: &'a str,
}

/// Returns the registry of `image`: the part before the first slash, if that is a host.
pub fn registry_of(image: &str) -> String {
    match image.split_once('/') {
        Some((host, _)) if host == "localhost" || host.contains(['.', ':']) => normalized(host),
        _ => DOCKER_HUB.to_owned(),
    }
}

/// Returns the host of `registry`, with its port if there is one; `registry` may be a URL.
fn normalized(registry: &str) -> String {
    let host = registry.trim();
    let host = host.strip_prefix("https://").or(host.strip_prefix("http://")).unwrap_or(host);
    let host = host.split('/').next().unwrap_or_default().to_ascii_lowercase();
    if DOCKER_HUB_ALIASES.contains(&host.as_str()) { DOCKER_HUB.to_owned() } else { host }
}

impl RegistryLogin {
    fn new(registry: &str, username: &str, password: &str) -> Self {
        // Values that were read from files or programs end with a line end, which is not part of them.
        let trimmed = |text: &str| text.trim_end_matches(['\r', '\n']).to_owned();
        let (username, password) = (trimmed(username), trimmed(password));
        Self { registry: normalized(registry), username, password }
    }

    /// Makes a login of a job's credentials. Those for ECR are exchanged for a password by the program `aws`.
    pub async fn from_credentials(
        credentials: &RegistryCredentials,
        environment: &[(OsString, OsString)],
    ) -> Result<Self, StepError> {
        match credentials {
            RegistryCredentials::DockerHub { username, password } => {
                Ok(Self::new(DOCKER_HUB, username, password))
            }
            RegistryCredentials::Generic { url, username, password } => {
                Ok(Self::new(url, username, password))
            }
            RegistryCredentials::Gcr { hostname, key_file } => {
                let key = std::str::from_utf8(key_file)
                    .map_err(|_| StepError::new("the key file is not UTF-8 text"))?;
                Ok(Self::new(hostname, "_json_key", key))
            }
            RegistryCredentials::Ecr { region, access_key_id, secret_access_key, account_id } => {
                let aws = Aws { environment, region, access_key_id, secret_access_key };
                let account = match account_id {
                    Some(account) => account.clone(),
                    None => {
                        let query = ["sts", "get-caller-identity", "--query", "Account"];
                        aws.call(&[&query[..], &["--output", "text"]].concat()).await?
                    }
                };
                let password = aws.call(&["ecr", "get-login-password"]).await?;
                let registry = format!("{account}.dkr.ecr.{region}.amazonaws.com");
                Ok(Self::new(&registry, "AWS", &password))
            }
        }
    }

    /// Lets the engine try the login. A refusal is an error with the registry's message.
    pub async fn check(&self, engine: &Engine) -> Result<(), StepError> {
        let request = AuthRequest {
            username: &self.username,
            password: &self.password,
            serveraddress: self.server_address(),
        };
        let body = serde_json::to_vec(&request).map_err(StepError::new)?;
        engine.post("/auth", &body).await.map_err(StepError::new)
    }

    fn server_address(&self) -> &str {
        if self.registry == DOCKER_HUB { DOCKER_HUB_KEY } else { &self.registry }
    }

    fn for_engine(&self) -> DockerCredentials {
        let serveraddress = Some(self.server_address().to_owned());
        let (username, password) = (self.username.clone(), self.password.clone());
        if username == IDENTITY_TOKEN {
            let identitytoken = Some(password);
            return DockerCredentials { serveraddress, identitytoken, ..Default::default() };
        }
        DockerCredentials {
            serveraddress,
            username: Some(username),
            password: Some(password),
            ..Default::default()
        }
    }
}

/// The username with which credential helpers announce an identity token instead of a password.
const IDENTITY_TOKEN: &str = "<token>";

/// A job's AWS credentials, for the program `aws`.
struct Aws<'a> {
    environment: &'a [(OsString, OsString)],
    region: &'a str,
    access_key_id: &'a str,
    secret_access_key: &'a str,
}

impl Aws<'_> {
    async fn call(&self, arguments: &[&str]) -> Result<String, StepError> {
        let mut command = Command::new("aws");
        command.args(arguments).env_clear().envs(self.environment.iter().cloned());
        command.env("AWS_REGION", self.region).env("AWS_DEFAULT_REGION", self.region);
        command.env("AWS_ACCESS_KEY_ID", self.access_key_id);
        command.env("AWS_SECRET_ACCESS_KEY", self.secret_access_key);
        // AWS variables of the agent's own user (session token, profile) do not belong to this key.
        command.env_remove("AWS_SESSION_TOKEN").env_remove("AWS_PROFILE");
        run("aws", command, b"").await
    }
}

/// Runs `aws` or a credential helper, and returns its output. An error shows the program's own message.
async fn run(name: &str, command: Command, input: &[u8]) -> Result<String, StepError> {
    let failed = |cause: Cause| StepError::of(format!("`{name}`"), cause);
    let output = timeout(PROGRAM_PATIENCE, stdout_of(command, input)).await;
    let output = output.map_err(|_| failed("did not end in time".into()))?;
    let output = output.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            failed("this program is needed on the agent's machine, but not installed".into())
        }
        _ => failed(error.into()),
    })?;
    if !output.status.success() {
        let message = &output.stderr[..output.stderr.len().min(SHOWN)];
        return Err(failed(String::from_utf8_lossy(message).trim().into()));
    }
    let text = String::from_utf8(output.stdout);
    text.map(|text| text.trim().to_owned())
        .map_err(|_| failed("its output is not UTF-8 text".into()))
}

/// Returns whether `helper` is a valid suffix of a program's name. Others, such as paths, must not be run.
fn is_helper(helper: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    !helper.is_empty() && helper.bytes().all(is_plain) && helper.bytes().any(|byte| byte != b'.')
}

/// The parts of Docker's `config.json` that matter here.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct DockerConfig {
    auths: BTreeMap<String, ConfigAuth>,
    creds_store: String,
    cred_helpers: BTreeMap<String, String>,
    proxies: BTreeMap<String, BTreeMap<String, String>>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
struct ConfigAuth {
    auth: String,
    identitytoken: String,
}

impl fmt::Debug for ConfigAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// The output of a credential helper's `get`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperResponse {
    username: String,
    secret: String,
}

/// The credentials for pulling a job's images.
#[derive(Clone, Debug)]
pub struct Registries {
    logins: Vec<RegistryLogin>,
    config: DockerConfig,
    environment: Vec<(OsString, OsString)>,
}

impl Registries {
    /// Returns the credentials of the agent's user. A Docker configuration that can't be read is only logged,
    /// and then ignored.
    pub fn for_user(home: &Path, environment: &[(OsString, OsString)]) -> Self {
        let directory =
            environment.iter().find(|(name, path)| name == "DOCKER_CONFIG" && !path.is_empty());
        let directory =
            directory.map_or_else(|| home.join(".docker"), |(_, path)| PathBuf::from(path));
        let path = directory.join("config.json");
        let config = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).unwrap_or_else(|_| {
                log::warn!(path:?; "the Docker configuration is malformed, and is ignored");
                DockerConfig::default()
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => DockerConfig::default(),
            Err(error) => {
                log::warn!(path:?, error:%; "the Docker configuration can't be read, and is ignored");
                DockerConfig::default()
            }
        };
        Self { logins: Vec::new(), config, environment: environment.to_vec() }
    }

    /// Adds a login of the job, which replaces others for the same registry.
    pub fn add(&mut self, login: RegistryLogin) {
        self.logins.push(login);
    }

    /// Returns the credentials for pulling `image`; `None` if there are none for its registry.
    pub async fn credentials_for(&self, image: &str) -> Option<DockerCredentials> {
        let registry = registry_of(image);
        if let Some(login) = self.logins.iter().rev().find(|login| login.registry == registry) {
            return Some(login.for_engine());
        }
        let is_it = |(key, _): &(&String, _)| normalized(key) == registry;
        let helper = self.config.cred_helpers.iter().find(|entry| normalized(entry.0) == registry);
        let (key, helper) = match helper {
            Some((key, helper)) => (key.clone(), helper.clone()),
            None if self.config.creds_store.is_empty() => {
                let (_, auth) = self.config.auths.iter().find(is_it)?;
                return auth.login(&registry).map(|login| login.for_engine());
            }
            None => {
                let key = self.config.auths.iter().find(is_it).map(|(key, _)| key.clone());
                let hub = || if registry == DOCKER_HUB { DOCKER_HUB_KEY } else { &registry };
                (key.unwrap_or_else(|| hub().to_owned()), self.config.creds_store.clone())
            }
        };
        if !is_helper(&helper) {
            log::warn!(helper; "the Docker configuration names an invalid credential helper");
            return None;
        }
        let name = format!("docker-credential-{helper}");
        let mut command = Command::new(&name);
        command.arg("get").env_clear().envs(self.environment.iter().cloned());
        match run(&name, command, key.as_bytes()).await {
            Ok(printed) => {
                let HelperResponse { username, secret } = serde_json::from_str(&printed).ok()?;
                Some(RegistryLogin::new(&registry, &username, &secret).for_engine())
            }
            Err(error) => {
                // Only a debug message: helpers fail if they have no credentials for the registry.
                log::debug!(registry, error:% = WithCauses(&error); "no credentials");
                None
            }
        }
    }

    /// Returns the variables by which containers use the proxies in the user's Docker configuration.
    pub fn proxy_variables(&self) -> Vec<(String, String)> {
        let names = [
            ("httpProxy", "HTTP_PROXY"),
            ("httpsProxy", "HTTPS_PROXY"),
            ("ftpProxy", "FTP_PROXY"),
            ("noProxy", "NO_PROXY"),
            ("allProxy", "ALL_PROXY"),
        ];
        let proxies = self.config.proxies.get("default");
        let set = names.into_iter().filter_map(|(key, name)| {
            Some((name, proxies?.get(key).filter(|value| !value.is_empty())?))
        });
        set.flat_map(|(name, value)| {
            [(name.to_owned(), value.clone()), (name.to_ascii_lowercase(), value.clone())]
        })
        .collect()
    }
}

impl ConfigAuth {
    fn login(&self, registry: &str) -> Option<RegistryLogin> {
        if !self.identitytoken.is_empty() {
            return Some(RegistryLogin::new(registry, IDENTITY_TOKEN, &self.identitytoken));
        }
        let decoded = BASE64_STANDARD.decode(self.auth.trim()).ok()?;
        let decoded = String::from_utf8(decoded).ok()?;
        let (username, password) = decoded.split_once(':')?;
        Some(RegistryLogin::new(registry, username, password.trim_end_matches('\0')))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_registry_is_a_host_before_the_first_slash() {
        for (image, registry) in [
            ("ruby", DOCKER_HUB),
            ("library/ruby:3", DOCKER_HUB),
            ("index.docker.io/library/ruby", DOCKER_HUB),
            ("localhost/x", "localhost"),
            ("127.0.0.1:5000/a/b@sha256:0", "127.0.0.1:5000"),
            ("eu.gcr.io/project/x", "eu.gcr.io"),
        ] {
            assert_eq!(registry_of(image), registry, "{image}");
        }
        assert_eq!(normalized("https://Registry.example/v2/"), "registry.example");
        assert_eq!(normalized(DOCKER_HUB_KEY), DOCKER_HUB);
    }

    fn user(config: &str, path: Option<&Path>) -> (tempfile::TempDir, Registries) {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(".docker")).unwrap();
        std::fs::write(home.path().join(".docker/config.json"), config).unwrap();
        let path = path.map(|path| ("PATH".into(), path.into()));
        let environment: Vec<_> = path.into_iter().collect();
        let registries = Registries::for_user(home.path(), &environment);
        (home, registries)
    }

    #[tokio::test]
    async fn credentials_of_the_job_win_over_those_of_the_user() {
        let auth = BASE64_STANDARD.encode("me:p:ss?");
        let config = format!(r#"{{"auths": {{"https://r.example": {{"auth": "{auth}"}}}}}}"#);
        let (_home, mut registries) = user(&config, None);
        let found = registries.credentials_for("r.example/x").await.unwrap();
        assert_eq!(
            (found.username.as_deref(), found.password.as_deref()),
            (Some("me"), Some("p:ss?"))
        );
        assert!(registries.credentials_for("ruby").await.is_none());
        registries.add(RegistryLogin::new("r.example", "job", "its"));
        let found = registries.credentials_for("r.example/x").await.unwrap();
        assert_eq!(found.username.as_deref(), Some("job"));
        assert!(!format!("{registries:?}").contains("its"));
    }

    #[tokio::test]
    async fn credential_helpers_are_used() {
        let programs = tempfile::tempdir().unwrap();
        let script = "#!/bin/sh\nread -r key\n[ \"$key\" = r.example ] || exit 1\n\
                      echo '{\"Username\":\"<token>\",\"Secret\":\"abc\"}'\n";
        program(programs.path(), "docker-credential-test", script);
        let path = format!("{}:/usr/bin:/bin", programs.path().display());
        for config in [r#"{"credHelpers": {"r.example": "test"}}"#, r#"{"credsStore": "test"}"#] {
            let (_home, registries) = user(config, Some(path.as_ref()));
            let found = registries.credentials_for("r.example/x").await.unwrap();
            assert_eq!((found.identitytoken.as_deref(), found.username), (Some("abc"), None));
            assert!(registries.credentials_for("other.example/x").await.is_none());
        }
    }

    fn program(directory: &Path, name: &str, script: &str) {
        let path = directory.join(name);
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[tokio::test]
    async fn ecr_passwords_and_missing_accounts_come_from_aws() {
        let programs = tempfile::tempdir().unwrap();
        let script = "#!/bin/sh\n\
            [ \"$AWS_REGION $AWS_ACCESS_KEY_ID $AWS_SECRET_ACCESS_KEY\" = 'eu id key' ] || exit 9\n\
            case \"$*\" in *key*) exit 8;; sts*) echo 1234;; ecr*) echo secret;; esac\n";
        program(programs.path(), "aws", &script.replace("*key*)", "*' key'*)"));
        let path = format!("{}:/usr/bin:/bin", programs.path().display());
        let environment = [("PATH".into(), path.into())];
        let ecr = |account_id: Option<&str>, key: &str| RegistryCredentials::Ecr {
            region: "eu".into(),
            access_key_id: "id".into(),
            secret_access_key: key.into(),
            account_id: account_id.map(str::to_owned),
        };
        for (account, registry) in
            [(None, "1234.dkr.ecr.eu.amazonaws.com"), (Some("7"), "7.dkr.ecr.eu.amazonaws.com")]
        {
            let login =
                RegistryLogin::from_credentials(&ecr(account, "key"), &environment).await.unwrap();
            assert_eq!(login, RegistryLogin::new(registry, "AWS", "secret"));
        }
        let refused =
            RegistryLogin::from_credentials(&ecr(None, "other"), &environment).await.unwrap_err();
        assert_eq!(refused.to_string(), "`aws`");
        let none = [("PATH".into(), "/missing".into())];
        let missing = RegistryLogin::from_credentials(&ecr(None, "key"), &none).await.unwrap_err();
        let missing = WithCauses(&missing).to_string();
        assert!(missing.starts_with("`aws`: this program is needed"), "{missing}");
    }

    #[tokio::test]
    async fn other_kinds_of_credentials_need_no_program() {
        let hub = RegistryCredentials::DockerHub { username: "me".into(), password: "p".into() };
        assert_eq!(
            RegistryLogin::from_credentials(&hub, &[]).await.unwrap(),
            RegistryLogin::new(DOCKER_HUB, "me", "p")
        );
        let key_file = bytes::Bytes::from_static(b"{\"a\": 1}");
        let gcr = RegistryCredentials::Gcr { hostname: "eu.gcr.io".into(), key_file };
        let login = RegistryLogin::from_credentials(&gcr, &[]).await.unwrap();
        assert_eq!(login, RegistryLogin::new("eu.gcr.io", "_json_key", "{\"a\": 1}"));
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let refused = run("aws", Command::new("/missing/aws"), b"").await.unwrap_err();
        let refused = WithCauses(&refused).to_string();
        assert!(refused.contains("`aws`") && refused.contains("not installed"), "{refused}");
    }

    #[test]
    fn containers_get_the_proxies_of_the_user() {
        let config = r#"{"proxies": {"default": {"httpProxy": "http://p:1", "noProxy": "x"}}}"#;
        let (_home, registries) = user(config, None);
        let variables = registries.proxy_variables();
        let names: Vec<_> = variables.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy"]);
    }
}
