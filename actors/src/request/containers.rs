//! Decodes the containers in a request.

use std::collections::HashSet;

use bytes::Bytes;
use serde::Deserialize;

use super::values::{Names, RawEnvVar, RawFile, decode_environment, decode_files};
use super::{List, OnlyMap, RawCommand, decode_commands, null_is_empty, problem};
use crate::job::containers::{Compose, Container, ContainerName, RegistryCredentials};
use crate::job::{EnvVar, InjectedFile, Problem, Problems};

raw!(RawCompose {
    containers: List<OnlyMap<RawContainer>>,
    image_pull_credentials: List<OnlyMap<RawCredentials>>,
    host_setup_commands: List<OnlyMap<RawCommand>>,
});
raw!(RawContainer {
    name: String,
    image: String,
    command: String,
    entrypoint: String,
    user: String,
    env_vars: List<OnlyMap<RawEnvVar>>,
    files: List<OnlyMap<RawFile>>,
});
raw!(RawCredentials { env_vars: List<OnlyMap<RawEnvVar>>, files: List<OnlyMap<RawFile>> });

/// The path by which job files give the key of a Google registry (docs/protocol.md: "Docker executor").
const GCR_KEY_FILE: &str = "/tmp/gcr/keyfile.json";

const KNOWN_CREDENTIALS: &str = "DockerHub, GenericDocker, AWS_ECR, GCR";

impl RawCompose {
    pub(super) fn decode(self) -> Result<Compose, Problems> {
        let mut problems = Problems::new();
        let mut names = HashSet::new();
        let mut containers = Vec::new();
        for (index, OnlyMap(raw)) in self.containers.0.into_iter().enumerate() {
            let at = format!("compose.containers[{index}].");
            match raw.decode(&at, index == 0) {
                Ok(container) if !names.insert(container.name.clone()) => problems.push(problem(
                    format!("{at}name"),
                    format!("`{}` is the name of another container too", container.name.as_str()),
                )),
                Ok(container) => containers.push(container),
                Err(its) => problems.extend(its),
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let mut containers = containers.into_iter();
        let Some(main) = containers.next() else {
            return Err(vec![problem(
                "compose.containers".into(),
                "a job for `dockercompose` needs at least one container, the first of which runs \
                 its commands",
            )]);
        };
        Ok(Compose {
            main,
            side_containers: containers.collect(),
            credentials: decode_credentials(&self.image_pull_credentials),
            host_setup_commands: decode_commands(self.host_setup_commands),
        })
    }
}

impl RawContainer {
    fn decode(self, at: &str, is_main: bool) -> Result<Container, Problems> {
        let mut problems = Problems::new();
        let name = ContainerName::new(&self.name);
        if name.is_none() {
            problems.push(problem(
                format!("{at}name"),
                format!(
                    "invalid container name `{}`: letters, digits, `.`, `_` and `-` only, at most \
                     63, and a letter or digit first",
                    self.name.escape_debug()
                ),
            ));
        }
        let image = self.image.trim();
        if image.is_empty() {
            problems.push(problem(format!("{at}image"), "an image is needed"));
        }
        let mut words = |field: &str, text: &str| {
            // As in Compose, `$$` stands for one dollar sign.
            let words = shlex::split(&without_comments(&text.replace("$$", "$")));
            if words.is_none() {
                let why = "has a quote that is not closed, or ends with a backslash";
                problems.push(problem(format!("{at}{field}"), why));
            }
            words.unwrap_or_default()
        };
        let entrypoint = words("entrypoint", &self.entrypoint);
        // The main container runs the job's shell instead.
        let command = if is_main { Vec::new() } else { words("command", &self.command) };
        let decoded = decode_environment(at, &self.env_vars, Names::Container);
        let environment = decoded.map_or_else(
            |its| {
                problems.extend(its);
                Vec::new()
            },
            |decoded| decoded.variables,
        );
        // Container engines accept UTF-8 only.
        let is_no_text = |variable: &&EnvVar| std::str::from_utf8(&variable.value).is_err();
        problems.extend(environment.iter().filter(is_no_text).map(|variable| {
            let name = variable.name.as_str();
            problem(format!("{at}env_vars"), format!("the value of `{name}` is not UTF-8"))
        }));
        let files: Vec<InjectedFile> = decode_files(at, &self.files, false).unwrap_or_else(|its| {
            problems.extend(its);
            Vec::new()
        });
        match name {
            Some(name) if problems.is_empty() => Ok(Container {
                name,
                image: image.to_owned(),
                entrypoint,
                command,
                user: Some(self.user).filter(|user| !user.is_empty()),
                environment,
                files,
            }),
            _ => Err(problems),
        }
    }
}

/// Escapes each `#` that would begin a comment for the splitter: Compose has no comments.
fn without_comments(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    // The open quote, if any; whether the last character was an escaping backslash; whether a word
    // begins here.
    let (mut quote, mut backslash, mut between) = (None, false, true);
    for c in text.chars() {
        if c == '#' && between && !backslash && quote.is_none() {
            escaped.push('\\');
        }
        escaped.push(c);
        match quote {
            _ if backslash => backslash = false,
            _ if c == '\\' && quote != Some('\'') => backslash = true,
            Some(open) if c == open => quote = None,
            None if c == '\'' || c == '"' => quote = Some(c),
            _ => {}
        }
        between = c.is_ascii_whitespace() && quote.is_none() && !backslash;
    }
    escaped
}

fn decode_credentials(
    raw: &[OnlyMap<RawCredentials>],
) -> Result<Vec<RegistryCredentials>, Problems> {
    let mut problems = Problems::new();
    let mut credentials = Vec::new();
    for (index, OnlyMap(raw)) in raw.iter().enumerate() {
        let at = format!("compose.image_pull_credentials[{index}].");
        let variables = decode_environment(&at, &raw.env_vars, Names::Container);
        match (variables, decode_files(&at, &raw.files, false)) {
            (Ok(decoded), Ok(files)) => {
                let given = Given { at: &at, variables: &decoded.variables, files: &files };
                match given.decode() {
                    Ok(decoded) => credentials.push(decoded),
                    Err(why) => problems.push(why),
                }
            }
            (variables, files) => {
                problems.extend(variables.err().into_iter().chain(files.err()).flatten());
            }
        }
    }
    if problems.is_empty() { Ok(credentials) } else { Err(problems) }
}

/// Removes line ends at the end of `value`: editors and `echo … | base64` add one.
fn without_line_ends(value: &Bytes) -> Bytes {
    let end =
        value.iter().rposition(|byte| !matches!(byte, b'\r' | b'\n')).map_or(0, |last| last + 1);
    value.slice(..end)
}

/// The variables and files of one entry of `image_pull_credentials`.
struct Given<'a> {
    at: &'a str,
    variables: &'a [EnvVar],
    files: &'a [InjectedFile],
}

impl Given<'_> {
    fn decode(&self) -> Result<RegistryCredentials, Problem> {
        match self.optional("DOCKER_CREDENTIAL_TYPE")?.as_deref() {
            Some("DockerHub") => Ok(RegistryCredentials::DockerHub {
                username: self.needed("DOCKERHUB_USERNAME")?,
                password: self.needed("DOCKERHUB_PASSWORD")?,
            }),
            Some("GenericDocker") => Ok(RegistryCredentials::Generic {
                url: self.needed("DOCKER_URL")?,
                username: self.needed("DOCKER_USERNAME")?,
                password: self.needed("DOCKER_PASSWORD")?,
            }),
            Some("AWS_ECR") => Ok(RegistryCredentials::Ecr {
                region: self.needed("AWS_REGION")?,
                access_key_id: self.needed("AWS_ACCESS_KEY_ID")?,
                secret_access_key: self.needed("AWS_SECRET_ACCESS_KEY")?,
                account_id: self.optional("AWS_ACCOUNT_ID")?,
            }),
            Some("GCR") => {
                let key = self.files.iter().find(|file| file.path == GCR_KEY_FILE);
                let key =
                    key.map(|file| without_line_ends(&file.content)).filter(|key| !key.is_empty());
                Ok(RegistryCredentials::Gcr {
                    hostname: self.needed("GCR_HOSTNAME")?,
                    key_file: key.ok_or_else(|| {
                        problem(format!("{}files", self.at), format!("{GCR_KEY_FILE} is missing"))
                    })?,
                })
            }
            Some(unknown) => Err(self.refusal(format!(
                "DOCKER_CREDENTIAL_TYPE `{}` is not known; known are: {KNOWN_CREDENTIALS}",
                unknown.escape_debug()
            ))),
            None => Err(self.refusal(format!(
                "DOCKER_CREDENTIAL_TYPE is missing; known are: {KNOWN_CREDENTIALS}"
            ))),
        }
    }

    fn refusal(&self, why: String) -> Problem {
        problem(format!("{}env_vars", self.at), why)
    }

    fn optional(&self, name: &str) -> Result<Option<String>, Problem> {
        let variable = self.variables.iter().find(|variable| variable.name.as_str() == name);
        let value = variable.map(|variable| without_line_ends(&variable.value));
        let Some(value) = value.filter(|value| !value.is_empty()) else {
            return Ok(None);
        };
        match String::from_utf8(value.into()) {
            Ok(text) => Ok(Some(text)),
            Err(_) => Err(self.refusal(format!("the value of {name} is not UTF-8"))),
        }
    }

    fn needed(&self, name: &str) -> Result<String, Problem> {
        self.optional(name)?.ok_or_else(|| self.refusal(format!("{name} is missing")))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn decode(compose: Value) -> Result<Compose, Vec<String>> {
        let raw: RawCompose = serde_json::from_value(compose).unwrap();
        raw.decode().map_err(|problems| problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn the_first_container_is_the_main_one_and_its_command_is_ignored() {
        let compose = decode(json!({"containers": [
            {"name": "main", "image": " ruby:3 ", "command": "puma 'unclosed", "user": "dev"},
            {"name": "db", "image": "postgres", "command": "postgres -c 'a b=\"c\"'",
             "entrypoint": "/init --", "env_vars": [{"name": "P", "value": "cA=="}]},
        ]}))
        .unwrap();
        assert_eq!((compose.main.image.as_str(), compose.main.command.len()), ("ruby:3", 0));
        assert_eq!(compose.main.user.as_deref(), Some("dev"));
        let [db] = &compose.side_containers[..] else { panic!("one side container") };
        assert_eq!(db.command, ["postgres", "-c", "a b=\"c\""]);
        assert_eq!(db.entrypoint, ["/init", "--"]);
        assert_eq!(&db.environment[0].value[..], b"p");
    }

    #[test]
    fn a_hash_in_a_command_begins_no_comment() {
        for (command, words) in [
            (
                "redis-server --requirepass #secret x",
                &["redis-server", "--requirepass", "#secret", "x"][..],
            ),
            ("#a 'b #c' \"#d\" \\#e f#g", &["#a", "b #c", "#d", "#e", "f#g"]),
        ] {
            let side = json!({"name": "side", "image": "a", "command": command});
            let compose = decode(json!({"containers": [{"name": "main", "image": "a"}, side]}));
            assert_eq!(compose.unwrap().side_containers[0].command, words);
        }
    }

    #[test]
    fn problems_of_containers_have_the_paths_of_their_fields() {
        let problems = decode(json!({"containers": [
            {"name": "main", "image": "a"},
            {"name": "-x", "image": "", "command": "'", "files": [{"path": "f", "content": "*"}]},
            {"name": "main", "image": "b"},
        ]}))
        .unwrap_err();
        let places: Vec<_> = problems.iter().map(|text| text.split(": ").next().unwrap()).collect();
        assert_eq!(
            places,
            [
                "compose.containers[1].name",
                "compose.containers[1].image",
                "compose.containers[1].command",
                "compose.containers[1].files[0].content",
                "compose.containers[2].name",
            ]
        );
        let none = decode(json!({"containers": []})).unwrap_err();
        assert!(none[0].contains("needs at least one container"), "{none:?}");
    }

    fn credentials(variables: &Value, files: &Value) -> Result<RegistryCredentials, String> {
        let variables: Vec<_> = variables
            .as_object()
            .unwrap()
            .iter()
            .map(|(name, value)| {
                use base64::Engine as _;
                let value = base64::prelude::BASE64_STANDARD.encode(value.as_str().unwrap());
                json!({"name": name, "value": value})
            })
            .collect();
        let compose = decode(json!({
            "containers": [{"name": "main", "image": "a"}],
            "image_pull_credentials": [{"env_vars": variables, "files": files}],
        }))
        .unwrap();
        compose.credentials.map(|mut all| all.remove(0)).map_err(|problems| problems[0].to_string())
    }

    #[test]
    fn each_kind_of_credentials_is_decoded() {
        let hub = credentials(
            &json!({"DOCKER_CREDENTIAL_TYPE": "DockerHub", "DOCKERHUB_USERNAME": "me",
                   "DOCKERHUB_PASSWORD": "p?>~\""}),
            &json!([]),
        );
        let (username, password) = ("me".to_owned(), "p?>~\"".to_owned());
        assert_eq!(hub, Ok(RegistryCredentials::DockerHub { username, password }));
        let with_line_ends = credentials(
            &json!({"DOCKER_CREDENTIAL_TYPE": "DockerHub\n", "DOCKERHUB_USERNAME": "me\n",
                   "DOCKERHUB_PASSWORD": " p \r\n"}),
            &json!([]),
        );
        let (username, password) = ("me".to_owned(), " p ".to_owned());
        assert_eq!(with_line_ends, Ok(RegistryCredentials::DockerHub { username, password }));
        let gcr = credentials(
            &json!({"DOCKER_CREDENTIAL_TYPE": "GCR", "GCR_HOSTNAME": "gcr.io"}),
            &json!([{"path": GCR_KEY_FILE, "content": "e30=", "mode": "0600"}]),
        );
        let (hostname, key_file) = ("gcr.io".to_owned(), Bytes::from_static(b"{}"));
        assert_eq!(gcr, Ok(RegistryCredentials::Gcr { hostname, key_file }));
        let ecr = credentials(
            &json!({"DOCKER_CREDENTIAL_TYPE": "AWS_ECR", "AWS_REGION": "r",
                   "AWS_ACCESS_KEY_ID": "i", "AWS_SECRET_ACCESS_KEY": "hunter2"}),
            &json!([]),
        )
        .unwrap();
        assert!(matches!(&ecr, RegistryCredentials::Ecr { account_id: None, .. }));
        assert!(!format!("{ecr:?}").contains("hunter2"));
    }

    #[test]
    fn what_is_missing_in_credentials_is_reported() {
        for (variables, why) in [
            (json!({}), "DOCKER_CREDENTIAL_TYPE is missing; known are: DockerHub"),
            (json!({"DOCKER_CREDENTIAL_TYPE": "Quay"}), "`Quay` is not known; known are"),
            (json!({"DOCKER_CREDENTIAL_TYPE": "GenericDocker"}), "DOCKER_URL is missing"),
            (
                json!({"DOCKER_CREDENTIAL_TYPE": "GCR", "GCR_HOSTNAME": "h"}),
                "keyfile.json is missing",
            ),
        ] {
            let refused = credentials(&variables, &json!([])).unwrap_err();
            assert!(refused.contains(why), "{refused}");
        }
    }
}
