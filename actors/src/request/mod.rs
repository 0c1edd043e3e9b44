//! The schema of a job request (docs/protocol.md: "The job request"), and its decoding into a [`Job`].
//!
//! [`WireRequest`] and [`HubRequest`] come over the wire; [`FileRequest`] also knows the aliases
//! for job files. `null` and absent mean empty everywhere.

// None of these types is `Debug`, as they hold secrets.
macro_rules! raw {
    ($name:ident { $($field:ident: $type:ty),* $(,)? }) => {
        #[derive(Default, Deserialize)]
        pub(super) struct $name {
            $(
                #[serde(default, deserialize_with = "null_is_empty")]
                pub(super) $field: $type,
            )*
        }
    };
}

mod containers;
mod omissions;
mod values;

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use self::containers::RawCompose;
pub use self::values::parse_octal_mode;
use self::values::{
    Environment, Names, RawEnvVar, RawFile, decode_environment, decode_files, decode_ssh_keys,
};
use crate::job::{
    Callbacks, Command, ExecutorKind, Job, JobId, LogMethod, Logger, Problem, Problems, PushTarget,
};

/// The default of `logger.max_size_in_bytes`.
const DEFAULT_MAX_LOG_SIZE: u64 = 16 * 1024 * 1024;

/// The valid values of `executor`.
pub const KNOWN_EXECUTORS: [&str; 2] = ["shell", "dockercompose"];

/// Returns the fields of a part of a job file, named by the key that holds it: with `None` those of
/// the request itself, and an empty slice for a key without parts.
pub fn known_fields(part: Option<&str>) -> &'static [&'static str] {
    match part {
        None => &[
            "job_id",
            "id",
            "job_name",
            "executor",
            "compose",
            "env_vars",
            "files",
            "file",
            "commands",
            "epilogue_always_commands",
            "epilogue_commands",
            "epilogue_on_pass_commands",
            "epilogue_on_fail_commands",
            "ssh_public_keys",
            "callbacks",
            "logger",
        ],
        Some("compose") => &["containers", "image_pull_credentials", "host_setup_commands"],
        Some("containers") => {
            &["name", "image", "command", "entrypoint", "user", "env_vars", "files"]
        }
        Some("image_pull_credentials") => &["env_vars", "files"],
        Some("env_vars") => &["name", "value"],
        Some("files" | "file") => &["path", "content", "mode"],
        Some("callbacks") => &["finished", "teardown_finished", "token"],
        Some("logger") => &["method", "url", "token", "max_size_in_bytes"],
        Some(part) if part.ends_with("commands") => &["directive", "alias"],
        Some(_) => &[],
    }
}

/// The request has no `job_id`, or an empty one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the job has no id: `job_id` must be a string that is not empty")]
pub struct NoJobId;

fn null_is_empty<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// Accepts a map only. A derived `Deserialize` would also accept a sequence of the fields' values,
/// which can only be a mistake.
#[derive(Default)]
pub struct OnlyMap<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OnlyMap<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
            type Value = OnlyMap<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of fields")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<OnlyMap<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(OnlyMap)
            }
        }

        deserializer.deserialize_map(Fields(PhantomData))
    }
}

/// The most elements of any list in a request; control planes send at most 300 variables. Without a
/// limit, a small request could use up the memory: two bytes of JSON become hundreds.
pub const MOST_ELEMENTS: usize = 10_000;

/// A list of at most [`MOST_ELEMENTS`] elements.
struct List<T>(Vec<T>);

impl<T> Default for List<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Deref for List<T> {
    type Target = Vec<T>;

    fn deref(&self) -> &Vec<T> {
        &self.0
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Elements<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Elements<T> {
            type Value = List<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a sequence")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<List<T>, A::Error> {
                let mut elements = Vec::new();
                while let Some(element) = list.next_element()? {
                    if elements.len() == MOST_ELEMENTS {
                        let why = format!("has more than {MOST_ELEMENTS} elements");
                        return Err(A::Error::custom(why));
                    }
                    elements.push(element);
                }
                Ok(List(elements))
            }
        }

        deserializer.deserialize_seq(Elements(PhantomData))
    }
}

/// Defines a schema. Only that of files has aliases: over the wire, a field `id` is unknown like
/// any other, and must not clash with `job_id`.
macro_rules! request_schema {
    ($(#[$doc:meta])* $name:ident
        , variables: $names:expr
        $(, id: $id:literal, epilogue: $epilogue:literal, files: $files:literal)?) => {
        $(#[$doc])*
        #[derive(Deserialize)]
        pub struct $name {
            #[serde(default, deserialize_with = "null_is_empty" $(, alias = $id)?)]
            job_id: String,
            #[serde(default, deserialize_with = "null_is_empty")]
            job_name: String,
            #[serde(default, deserialize_with = "null_is_empty")]
            executor: String,
            #[serde(default, deserialize_with = "null_is_empty")]
            compose: OnlyMap<RawCompose>,
            #[serde(default, deserialize_with = "null_is_empty")]
            commands: List<OnlyMap<RawCommand>>,
            #[serde(default, deserialize_with = "null_is_empty" $(, alias = $epilogue)?)]
            epilogue_always_commands: List<OnlyMap<RawCommand>>,
            #[serde(default, deserialize_with = "null_is_empty")]
            epilogue_on_pass_commands: List<OnlyMap<RawCommand>>,
            #[serde(default, deserialize_with = "null_is_empty")]
            epilogue_on_fail_commands: List<OnlyMap<RawCommand>>,
            #[serde(default, deserialize_with = "null_is_empty")]
            env_vars: List<OnlyMap<RawEnvVar>>,
            #[serde(default, deserialize_with = "null_is_empty" $(, alias = $files)?)]
            files: List<OnlyMap<RawFile>>,
            #[serde(default, deserialize_with = "null_is_empty")]
            ssh_public_keys: List<String>,
            #[serde(default, deserialize_with = "null_is_empty")]
            callbacks: OnlyMap<RawCallbacks>,
            #[serde(default, deserialize_with = "null_is_empty")]
            logger: OnlyMap<RawLogger>,
        }

        impl $name {
            /// Decodes the request. A part that is not valid becomes its [`Problems`].
            pub fn decode(self) -> Result<Job, NoJobId> {
                let octal_modes = self.executor != "dockercompose";
                let executor = decode_executor(&self.executor, self.compose.0);
                let (environment, skipped_variables) = match decode_environment("", &self.env_vars, $names) {
                    Ok(Environment { variables, skipped }) => (Ok(variables), skipped),
                    Err(problems) => (Err(problems), Vec::new()),
                };
                Ok(Job {
                    id: JobId::new(self.job_id).ok_or(NoJobId)?,
                    name: Some(self.job_name).filter(|name| !name.is_empty()),
                    executor,
                    environment,
                    skipped_variables,
                    files: decode_files("", &self.files, octal_modes),
                    commands: decode_commands(self.commands),
                    epilogue_always: decode_commands(self.epilogue_always_commands),
                    epilogue_on_pass: decode_commands(self.epilogue_on_pass_commands),
                    epilogue_on_fail: decode_commands(self.epilogue_on_fail_commands),
                    ssh_keys: decode_ssh_keys(&self.ssh_public_keys),
                    callbacks: self.callbacks.0.decode(),
                    logger: self.logger.0.decode(),
                })
            }

            /// Returns the indices of the `env_vars` that a later one with the same name replaces.
            pub fn replaced_variables(&self) -> Vec<usize> {
                let last: BTreeMap<&str, usize> =
                    self.env_vars.iter().enumerate().map(|(i, v)| (v.0.name.as_str(), i)).collect();
                (0..self.env_vars.len()).filter(|i| last[self.env_vars[*i].0.name.as_str()] != *i).collect()
            }

            /// Returns the name of `env_vars[index]`, as written.
            ///
            /// # Panics
            ///
            /// If there is no such variable.
            pub fn variable_name(&self, index: usize) -> &str {
                &self.env_vars[index].0.name
            }
        }
    };
}

request_schema!(
    /// A request as a client posts it to `agent serve`.
    WireRequest, variables: Names::Shell
);
request_schema!(
    /// A request as `agent start` fetches it. Variables that a shell can't hold are skipped.
    HubRequest, variables: Names::ShellOrSkipped
);
request_schema!(
    /// A request in a job file for `agent run`.
    FileRequest, variables: Names::Shell, id: "id", epilogue: "epilogue_commands", files: "file"
);

raw!(RawCallbacks { finished: String, teardown_finished: String, token: String });
raw!(RawLogger { method: String, url: String, token: String, max_size_in_bytes: u64 });

impl RawCallbacks {
    fn decode(self) -> Callbacks {
        let set = |text: String| Some(text).filter(|text| !text.is_empty());
        Callbacks {
            finished: set(self.finished),
            teardown_finished: set(self.teardown_finished),
            token: set(self.token),
        }
    }
}

impl RawLogger {
    fn decode(&self) -> Result<Logger, Problems> {
        let method = match self.method.as_str() {
            "" | "pull" => LogMethod::Pull,
            "push" => {
                LogMethod::Push(PushTarget { url: self.url.clone(), token: self.token.clone() })
            }
            unknown => {
                return Err(vec![problem(
                    "logger.method".into(),
                    format!("unknown method `{}`; known are: pull, push", unknown.escape_debug()),
                )]);
            }
        };
        let max_size = match self.max_size_in_bytes {
            0 => DEFAULT_MAX_LOG_SIZE,
            size => size,
        };
        Ok(Logger { method, max_size })
    }
}

raw!(RawCommand { directive: Option<String>, alias: String });

fn problem(path: String, message: impl Into<String>) -> Problem {
    Problem { path, message: message.into() }
}

fn decode_executor(name: &str, compose: RawCompose) -> Result<ExecutorKind, Problems> {
    match name {
        "" | "shell" => Ok(ExecutorKind::Shell),
        "dockercompose" => {
            compose.decode().map(|compose| ExecutorKind::DockerCompose(compose.into()))
        }
        unknown => Err(vec![problem(
            "executor".into(),
            format!("unknown executor `{unknown}`; known are: {}", KNOWN_EXECUTORS.join(", ")),
        )]),
    }
}

fn decode_commands(commands: List<OnlyMap<RawCommand>>) -> Vec<Command> {
    let decode = |OnlyMap(raw): OnlyMap<RawCommand>| Command {
        directive: raw.directive.unwrap_or_default(),
        alias: Some(raw.alias).filter(|alias| !alias.is_empty()),
    };
    commands.0.into_iter().map(decode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(json: &str) -> Job {
        serde_json::from_str::<FileRequest>(json).unwrap().decode().unwrap()
    }

    #[test]
    fn null_and_absent_fields_are_empty() {
        let job = decode(
            r#"{"job_id":"1","executor":null,"commands":null,"env_vars":[{"name":"A","value":null}],
                "files":null,"callbacks":null,"logger":{"max_size_in_bytes":null},"compose":null}"#,
        );
        assert_eq!(job.executor, Ok(ExecutorKind::Shell));
        assert!(job.environment.unwrap()[0].value.is_empty());
    }

    #[test]
    fn aliases_belong_to_files_only() {
        let aliased = r#"{"id":"1","file":[],"epilogue_commands":[{"directive":"x"}]}"#;
        assert_eq!(decode(aliased).epilogue_always.len(), 1);
        let wire: WireRequest = serde_json::from_str(aliased).unwrap();
        assert_eq!(wire.decode().unwrap_err(), NoJobId);
        let both: WireRequest =
            serde_json::from_str(r#"{"job_id":"1","id":{"any":"thing"}}"#).unwrap();
        assert_eq!(both.decode().unwrap().id.as_str(), "1");
    }

    #[test]
    fn a_list_is_refused_in_place_of_a_map() {
        for wrong in [
            r#"["1"]"#,
            r#"{"job_id":"1","commands":[["true"]]}"#,
            r#"{"job_id":"1","env_vars":[["A","MQ=="]]}"#,
            r#"{"job_id":"1","logger":["pull"]}"#,
        ] {
            let refused = serde_json::from_str::<OnlyMap<WireRequest>>(wrong).err().unwrap();
            assert!(refused.to_string().contains("sequence, expected a map"), "{refused}");
        }
    }

    #[test]
    fn variables_are_sorted_by_name_and_the_last_value_wins() {
        let job = decode(
            r#"{"job_id":"1","env_vars":[{"name":"B","value":"MQ"},{"name":"A","value":"Mg=="},
                {"name":"B","value":"M w\n= ="}]}"#,
        );
        let variables = job.environment.unwrap();
        let pairs: Vec<_> = variables.iter().map(|v| (v.name.as_str(), &v.value[..])).collect();
        assert_eq!(pairs, [("A", &b"2"[..]), ("B", b"3")]);
    }

    #[test]
    fn every_problem_has_the_path_of_its_field() {
        let job = decode(
            r#"{"job_id":"1","executor":"vm","env_vars":[{"name":"A=1; touch x; B","value":"!"},
                {"name":"N","value":"AA=="}],
                "files":[{"path":"","content":"*","mode":"rw"},{"path":"a","content":"","mode":"+644"}]}"#,
        );
        let problems: Vec<_> = job.problems().map(ToString::to_string).collect();
        let places: Vec<_> = job.problems().map(|p| p.path.as_str()).collect();
        assert_eq!(
            places,
            [
                "executor",
                "env_vars[0].name",
                "env_vars[0].value",
                "env_vars[1].value",
                "files[0].path",
                "files[0].mode",
                "files[0].content",
                "files[1].mode"
            ]
        );
        assert!(problems[0].contains("known are: shell, dockercompose"));
        assert!(problems[5].contains("bad file permission 'rw'"));
    }

    #[test]
    fn modes_are_octal() {
        assert_eq!(parse_octal_mode("0600"), Some(0o600));
        assert_eq!(parse_octal_mode("755"), Some(0o755));
        for bad in ["", "8", "u+x", "-1", "+7", "99999", "0o644"] {
            assert_eq!(parse_octal_mode(bad), None, "{bad}");
        }
    }
}
