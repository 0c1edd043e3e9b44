//! What registries know a job by: its own credentials, or those that the agent's user has for Docker.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use actors::job::containers::RegistryCredentials;
use actors::ports::StepError;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bollard::auth::DockerCredentials;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use crate::executors::docker::engine::Engine;
use crate::os::programs::answer_of;

/// The registry of images that name none.
const DOCKER_HUB: &str = "docker.io";

/// Other names of it.
const DOCKER_HUB_TOO: [&str; 4] =
    ["index.docker.io", "registry-1.docker.io", "hub.docker.com", "registry.hub.docker.com"];

/// How credentials for it are filed.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// How long a program that knows credentials may take.
const PROGRAM_PATIENCE: Duration = Duration::from_mins(1);

/// What is shown of what a program prints, in bytes.
const SHOWN: usize = 2000;

/// Name and password for one registry.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    registry: String,
    username: String,
    password: String,
}

/// Without the password.
impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.username, self.registry)
    }
}

/// The body of a request to try a login.
#[derive(Serialize)]
struct AuthRequest<'a> {
    username: &'a str,
    password: &'a str,
    serveraddress: &'a str,
}

/// The registry that `image` is in.
pub fn registry_of(image: &str) -> String {
    match image.split_once('/') {
        Some((host, _)) if host == "localhost" || host.contains(['.', ':']) => normal(host),
        _ => DOCKER_HUB.to_owned(),
    }
}

/// A registry's host, and its port if it has one, from however it is written.
fn normal(registry: &str) -> String {
    let host = registry.trim();
    let host = host.strip_prefix("https://").or(host.strip_prefix("http://")).unwrap_or(host);
    let host = host.split('/').next().unwrap_or_default().to_ascii_lowercase();
    if DOCKER_HUB_TOO.contains(&host.as_str()) { DOCKER_HUB.to_owned() } else { host }
}

impl Login {
    fn new(registry: &str, username: &str, password: &str) -> Self {
        // Files and pipes end with line ends, passwords don't.
        let trimmed = |text: &str| text.trim_end_matches(['\r', '\n']).to_owned();
        let (username, password) = (trimmed(username), trimmed(password));
        Self { registry: normal(registry), username, password }
    }

    /// Makes a name and a password of what the job brings.
    pub async fn of(
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
                    .map_err(|_| StepError("the key file is not text".into()))?;
                Ok(Self::new(hostname, "_json_key", key))
            }
            RegistryCredentials::Ecr { region, access_key_id, secret_access_key, account_id } => {
                let aws = Aws { environment, region, access_key_id, secret_access_key };
                let account = match account_id {
                    Some(account) => account.clone(),
                    None => {
                        let query = ["sts", "get-caller-identity", "--query", "Account"];
                        aws.ask(&[&query[..], &["--output", "text"]].concat()).await?
                    }
                };
                let password = aws.ask(&["ecr", "get-login-password"]).await?;
                let registry = format!("{account}.dkr.ecr.{region}.amazonaws.com");
                Ok(Self::new(&registry, "AWS", &password))
            }
        }
    }

    /// Has the engine try it; the registry's words if it is refused.
    pub async fn check(&self, engine: &Engine) -> Result<(), StepError> {
        let request = AuthRequest {
            username: &self.username,
            password: &self.password,
            serveraddress: self.server_address(),
        };
        let body = serde_json::to_vec(&request).map_err(|error| StepError(error.to_string()))?;
        engine.post("/auth", &body).await.map_err(|error| StepError(error.to_string()))
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

/// The name that stands for a token instead of a password.
const IDENTITY_TOKEN: &str = "<token>";

/// Amazon's own program.
struct Aws<'a> {
    environment: &'a [(OsString, OsString)],
    region: &'a str,
    access_key_id: &'a str,
    secret_access_key: &'a str,
}

impl Aws<'_> {
    async fn ask(&self, arguments: &[&str]) -> Result<String, StepError> {
        let mut command = Command::new("aws");
        command.args(arguments).env_clear().envs(self.environment.iter().cloned());
        command.env("AWS_REGION", self.region).env("AWS_DEFAULT_REGION", self.region);
        command.env("AWS_ACCESS_KEY_ID", self.access_key_id);
        command.env("AWS_SECRET_ACCESS_KEY", self.secret_access_key);
        // One of the agent's user would not fit this key.
        command.env_remove("AWS_SESSION_TOKEN").env_remove("AWS_PROFILE");
        run("aws", command, b"").await
    }
}

/// What a program that knows credentials prints; its own words if it fails.
async fn run(name: &str, command: Command, input: &[u8]) -> Result<String, StepError> {
    let failed = |why: String| StepError(format!("`{name}`: {why}"));
    let printed = timeout(PROGRAM_PATIENCE, answer_of(command, input)).await;
    let printed = printed.map_err(|_| failed("took too long".into()))?;
    let printed = printed.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            failed("this program is needed on the agent's machine, and is not there".into())
        }
        _ => failed(error.to_string()),
    })?;
    if !printed.status.success() {
        let words = &printed.stderr[..printed.stderr.len().min(SHOWN)];
        return Err(failed(String::from_utf8_lossy(words).trim().to_owned()));
    }
    let text = String::from_utf8(printed.stdout);
    text.map(|text| text.trim().to_owned()).map_err(|_| failed("prints no text".into()))
}

/// Whether `helper` is the end of a program's name, and does not lead anywhere else.
fn is_helper(helper: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    !helper.is_empty() && helper.bytes().all(is_plain) && helper.bytes().any(|byte| byte != b'.')
}

/// What `docker` of the agent's user is set up with, as far as it is of use here.
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

/// As helpers print it.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Helped {
    username: String,
    secret: String,
}

/// All that images may be pulled with.
#[derive(Clone, Debug)]
pub struct Registries {
    logins: Vec<Login>,
    config: DockerConfig,
    environment: Vec<(OsString, OsString)>,
}

impl Registries {
    /// What the agent's user has. A configuration that can't be read is as good as none.
    pub fn of_user(home: &Path, environment: &[(OsString, OsString)]) -> Self {
        let directory =
            environment.iter().find(|(name, path)| name == "DOCKER_CONFIG" && !path.is_empty());
        let directory =
            directory.map_or_else(|| home.join(".docker"), |(_, path)| PathBuf::from(path));
        let path = directory.join("config.json");
        let config = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).unwrap_or_else(|_| {
                log::warn!(path:?; "the configuration of docker can't be understood");
                DockerConfig::default()
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => DockerConfig::default(),
            Err(error) => {
                log::warn!(path:?, error:%; "the configuration of docker can't be read");
                DockerConfig::default()
            }
        };
        Self { logins: Vec::new(), config, environment: environment.to_vec() }
    }

    /// From now on its registry knows the job by it.
    pub fn add(&mut self, login: Login) {
        self.logins.push(login);
    }

    /// What to pull `image` with, if there is something.
    pub async fn credentials_for(&self, image: &str) -> Option<DockerCredentials> {
        let registry = registry_of(image);
        if let Some(login) = self.logins.iter().rev().find(|login| login.registry == registry) {
            return Some(login.for_engine());
        }
        let is_it = |(key, _): &(&String, _)| normal(key) == registry;
        let helper = self.config.cred_helpers.iter().find(|entry| normal(entry.0) == registry);
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
            log::warn!(helper; "the configuration of docker names a credential helper that is none");
            return None;
        }
        let name = format!("docker-credential-{helper}");
        let mut command = Command::new(&name);
        command.arg("get").env_clear().envs(self.environment.iter().cloned());
        match run(&name, command, key.as_bytes()).await {
            Ok(printed) => {
                let Helped { username, secret } = serde_json::from_str(&printed).ok()?;
                Some(Login::new(&registry, &username, &secret).for_engine())
            }
            Err(error) => {
                // Usual where it has nothing for this registry.
                log::debug!(registry, error:%; "no credentials");
                None
            }
        }
    }

    /// Variables that containers have for the user's proxies.
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
    fn login(&self, registry: &str) -> Option<Login> {
        if !self.identitytoken.is_empty() {
            return Some(Login::new(registry, IDENTITY_TOKEN, &self.identitytoken));
        }
        let decoded = BASE64_STANDARD.decode(self.auth.trim()).ok()?;
        let decoded = String::from_utf8(decoded).ok()?;
        let (username, password) = decoded.split_once(':')?;
        Some(Login::new(registry, username, password.trim_end_matches('\0')))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_registry_is_what_stands_before_the_first_slash_if_it_is_a_host() {
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
        assert_eq!(normal("https://Registry.example/v2/"), "registry.example");
        assert_eq!(normal(DOCKER_HUB_KEY), DOCKER_HUB);
    }

    fn user(config: &str, path: Option<&Path>) -> (tempfile::TempDir, Registries) {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(".docker")).unwrap();
        std::fs::write(home.path().join(".docker/config.json"), config).unwrap();
        let path = path.map(|path| ("PATH".into(), path.into()));
        let environment: Vec<_> = path.into_iter().collect();
        let registries = Registries::of_user(home.path(), &environment);
        (home, registries)
    }

    #[tokio::test]
    async fn images_without_credentials_of_the_job_use_those_of_the_user() {
        let auth = BASE64_STANDARD.encode("me:p:ss?");
        let config = format!(r#"{{"auths": {{"https://r.example": {{"auth": "{auth}"}}}}}}"#);
        let (_home, mut registries) = user(&config, None);
        let found = registries.credentials_for("r.example/x").await.unwrap();
        assert_eq!(
            (found.username.as_deref(), found.password.as_deref()),
            (Some("me"), Some("p:ss?"))
        );
        assert!(registries.credentials_for("ruby").await.is_none());
        registries.add(Login::new("r.example", "job", "its"));
        let found = registries.credentials_for("r.example/x").await.unwrap();
        assert_eq!(found.username.as_deref(), Some("job"));
        assert!(!format!("{registries:?}").contains("its"));
    }

    #[tokio::test]
    async fn helpers_are_asked() {
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
    async fn amazon_is_asked_for_a_password_and_for_the_account_if_it_is_not_given() {
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
            let login = Login::of(&ecr(account, "key"), &environment).await.unwrap();
            assert_eq!(login, Login::new(registry, "AWS", "secret"));
        }
        let refused = Login::of(&ecr(None, "other"), &environment).await.unwrap_err();
        assert!(refused.0.starts_with("`aws`: "), "{refused}");
        let none = [("PATH".into(), "/missing".into())];
        let missing = Login::of(&ecr(None, "key"), &none).await.unwrap_err();
        assert!(missing.0.contains("`aws`: this program is needed"), "{missing}");
    }

    #[tokio::test]
    async fn the_other_kinds_need_no_program() {
        let hub = RegistryCredentials::DockerHub { username: "me".into(), password: "p".into() };
        assert_eq!(Login::of(&hub, &[]).await.unwrap(), Login::new(DOCKER_HUB, "me", "p"));
        let key_file = bytes::Bytes::from_static(b"{\"a\": 1}");
        let gcr = RegistryCredentials::Gcr { hostname: "eu.gcr.io".into(), key_file };
        let login = Login::of(&gcr, &[]).await.unwrap();
        assert_eq!(login, Login::new("eu.gcr.io", "_json_key", "{\"a\": 1}"));
    }

    #[tokio::test]
    async fn a_program_that_is_missing_is_named() {
        let refused = run("aws", Command::new("/missing/aws"), b"").await.unwrap_err();
        assert!(refused.0.contains("`aws`") && refused.0.contains("is not there"), "{refused}");
    }

    #[test]
    fn proxies_of_the_user_are_variables_of_containers() {
        let config = r#"{"proxies": {"default": {"httpProxy": "http://p:1", "noProxy": "x"}}}"#;
        let (_home, registries) = user(config, None);
        let variables = registries.proxy_variables();
        let names: Vec<_> = variables.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy"]);
    }
}
