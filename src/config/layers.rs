//! Merges what flags, variables and a file set, and remembers where each value comes from.

use std::fmt::{Display, Write as _};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, FromArgMatches};
use serde_json::{Map, Value};

use super::common::CONFIG_FILE;
use super::file::{AnyValue, OptionsInFile};
use super::options::{BadValue, Opt, OptionValue, Spec};
use super::{ConfigError, PREFIX, nearest};
use crate::decode::place::{Segment, line_in_yaml};
use crate::decode::without_value;
use crate::service::environment::Environment;

/// Variables with the prefix of options that are not options.
const OTHER_VARIABLES: [&str; 4] = [
    "SEMAPHORE_AGENT_LOG_LEVEL",
    "SEMAPHORE_AGENT_LOG_FILE_PATH",
    "SEMAPHORE_AGENT_LOG_MAX_SIZE",
    "SEMAPHORE_AGENT_LOGS_COMPRESSION_SIZE",
];

/// The flag that shows the configuration.
const PRINT_CONFIG: &str = "print-config";

/// The options of one command.
pub trait OptionSet {
    /// In the order in which they are shown.
    const OPTIONS: &'static [&'static Spec];
    /// Whether a file can set them.
    const HAS_FILE: bool;
}

/// The options of `S` that the command line sets.
#[derive(Clone, Debug)]
pub struct Flags<S> {
    values: Map<String, Value>,
    /// Whether the configuration is to be shown instead of used.
    pub print_config: bool,
    of: PhantomData<fn() -> S>,
}

impl<S: OptionSet> clap::Args for Flags<S> {
    fn augment_args(command: Command) -> Command {
        let command = command.args(S::OPTIONS.iter().map(|option| option.flag()));
        if !S::HAS_FILE {
            return command;
        }
        let print = Arg::new(PRINT_CONFIG).long(PRINT_CONFIG).action(ArgAction::SetTrue);
        command.arg(print.help("Shows the options that are in force, and where each comes from"))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<S: OptionSet> FromArgMatches for Flags<S> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut values = Map::new();
        for option in S::OPTIONS {
            if matches.value_source(option.key) != Some(ValueSource::CommandLine) {
                continue;
            }
            let mut given = matches.get_many::<String>(option.key).into_iter().flatten().cloned();
            let value = if option.is_list() {
                // An empty flag is one empty text.
                let entries: Vec<String> = given.collect();
                if entries == [""] { Value::Array(Vec::new()) } else { entries.into() }
            } else {
                given.next_back().unwrap_or_default().into()
            };
            values.insert(option.key.to_owned(), value);
        }
        let print_config = S::HAS_FILE && matches.get_flag(PRINT_CONFIG);
        Ok(Self { values, print_config, of: PhantomData })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Where options are set, the nearest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layer {
    Flags,
    Variables,
    File,
}

/// A file of options.
#[derive(Default)]
struct OptionsFile {
    path: PathBuf,
    text: String,
}

/// The options in force.
pub struct Settings {
    options: &'static [&'static Spec],
    values: Map<String, Value>,
    origins: Vec<(&'static str, Layer)>,
    file: OptionsFile,
    /// What the operator may want to know.
    pub warnings: Vec<String>,
}

impl Settings {
    /// Merges `flags`, the variables of `environment`, and the file that one of them names.
    pub fn merge<S: OptionSet>(
        flags: &Flags<S>,
        environment: &Environment,
    ) -> Result<Self, ConfigError> {
        let mut settings = Self {
            options: S::OPTIONS,
            values: Map::new(),
            origins: Vec::new(),
            file: OptionsFile::default(),
            warnings: Vec::new(),
        };
        settings.add(Layer::Flags, flags.values.clone())?;
        let variables = settings.variables(environment)?;
        settings.add(Layer::Variables, variables)?;
        if let Some(path) = settings.get(&CONFIG_FILE) {
            settings.add_file(&path)?;
        }
        Ok(settings)
    }

    fn spec(&self, key: &str) -> Option<&'static Spec> {
        self.options.iter().find(|option| option.key == key).copied()
    }

    /// Returns what variables set; those that look like an option and are none become warnings.
    fn variables(&mut self, environment: &Environment) -> Result<Map<String, Value>, ConfigError> {
        let mut values = Map::new();
        let variables: Vec<_> = self.options.iter().map(|option| option.variable()).collect();
        for (name, value) in environment.with_prefix(PREFIX) {
            if OTHER_VARIABLES.contains(&name) {
                continue;
            }
            let Some(option) = self.options.iter().find(|option| option.variable() == name) else {
                let nearest = nearest(name, variables.iter().map(String::as_str));
                let nearest = nearest.unwrap_or_default();
                self.warnings.push(format!("unknown variable {name}; the nearest is {nearest}"));
                continue;
            };
            let value = value.to_str();
            let value = value.ok_or_else(|| ConfigError(format!("{name}: is not UTF-8")))?;
            let value = if option.is_list() {
                value.split_whitespace().collect()
            } else {
                Value::from(value)
            };
            values.insert(option.key.to_owned(), value);
        }
        Ok(values)
    }

    fn add_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let refuse = |why: String| ConfigError(format!("{}: {why}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
        // Some editors begin a file with a byte order mark.
        let text = text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text);
        let OptionsInFile(set) = serde_yaml::from_str(&text)
            .map_err(|error| refuse(without_value(&error.to_string())))?;
        self.file = OptionsFile { path: path.to_owned(), text };
        let mut values = Map::new();
        for (key, AnyValue(value)) in set {
            let Some(option) = self.spec(&key) else {
                let known = self.options.iter().map(|option| option.key);
                let known = nearest(&key, known).unwrap_or_default();
                let why = format!("unknown key `{key}`; `{known}` is the nearest known one");
                return Err(refuse(format!("{why}{}", self.at_line(&[Segment::key(&key)]))));
            };
            // Templates of files name options without a value.
            let is_unset = match &value {
                Value::Null => true,
                Value::String(text) => text.is_empty() && option.may_be_empty(),
                Value::Array(entries) => entries.is_empty() && option.is_hidden,
                _ => false,
            };
            if !is_unset {
                values.insert(key, value);
            }
        }
        if values.contains_key(CONFIG_FILE.spec.key) {
            let place = self.at_line(&[Segment::key(CONFIG_FILE.spec.key)]);
            let key = CONFIG_FILE.spec.key;
            return Err(refuse(format!("{key}: can't be set in the file itself{place}")));
        }
        self.add(Layer::File, values)
    }

    fn names_secret(&self, text: &str) -> bool {
        self.options.iter().any(|option| option.is_secret && text.contains(option.key))
    }

    /// Adds a layer below those that are there.
    fn add(&mut self, layer: Layer, values: Map<String, Value>) -> Result<(), ConfigError> {
        let set_nearer: Vec<&str> = self.origins.iter().map(|(key, _)| *key).collect();
        for (key, value) in values {
            let Some(option) = self.spec(&key) else { continue };
            let stands_in = |other: &&Spec| {
                other.key == key || other.group.is_some() && other.group == option.group
            };
            let nearer = set_nearer.iter().filter_map(|nearer| self.spec(nearer));
            let is_overruled = nearer.into_iter().any(|nearer| stands_in(&nearer));
            let normalised = (option.normalised)(&value).map_err(|bad| {
                // A line without its space or colon makes what is around it one value.
                let holds_secret = value.as_str().is_some_and(|text| self.names_secret(text));
                let unshown = (option.normalised)(&Value::Null).err().filter(|_| holds_secret);
                self.refuse_in(layer, option.key, &unshown.unwrap_or(bad))
            })?;
            if !is_overruled {
                self.origins.push((option.key, layer));
                self.values.insert(key, normalised);
            }
        }
        Ok(())
    }

    /// Returns the value of an option, which is its default if it is not set; `None` if it has none.
    pub fn get<T: OptionValue>(&self, option: &Opt<T>) -> Option<T> {
        let default = option.spec.default.map(Value::from);
        let value = self.values.get(option.spec.key).or(default.as_ref())?;
        T::from_value(value).ok()
    }

    /// Returns the value of an option, which is empty if it has none.
    pub fn get_or_empty<T: OptionValue + Default>(&self, option: &Opt<T>) -> T {
        self.get(option).unwrap_or_default()
    }

    /// Whether an option is set.
    pub fn is_set(&self, spec: &Spec) -> bool {
        self.values.contains_key(spec.key)
    }

    fn layer_of(&self, key: &str) -> Option<Layer> {
        self.origins.iter().find(|(known, _)| *known == key).map(|(_, layer)| *layer)
    }

    /// Returns an error that names the place of an option with a bad value.
    pub fn refuse(&self, spec: &Spec, why: impl Display) -> ConfigError {
        let bad = BadValue { why: why.to_string(), entry: None };
        match self.layer_of(spec.key) {
            Some(layer) => self.refuse_in(layer, spec.key, &bad),
            None => ConfigError(format!("{}: {}", spec.key, bad.why)),
        }
    }

    fn refuse_in(&self, layer: Layer, key: &str, bad: &BadValue) -> ConfigError {
        let why = &bad.why;
        ConfigError(match layer {
            Layer::Flags => format!("--{key}: {why}"),
            Layer::Variables => {
                let variable = self.spec(key).map(Spec::variable).unwrap_or_default();
                format!("{variable}: {why}")
            }
            Layer::File => {
                let entry = bad.entry.map(Segment::Index);
                let place: Vec<_> = [Segment::key(key)].into_iter().chain(entry).collect();
                let line = self.at_line(&place);
                format!("{}: {key}: {why}{line}", self.file.path.display())
            }
        })
    }

    /// Returns the line of a place in the file, in words.
    fn at_line(&self, place: &[Segment]) -> String {
        let line = line_in_yaml(&self.file.text, place);
        line.map_or_else(String::new, |line| format!(" at line {line}"))
    }

    /// Returns the options in the words of a configuration file, with their origins as comments. `in_force` are the
    /// values of options whose defaults depend on this machine.
    pub fn printed(&self, in_force: &[(&Spec, Value)]) -> String {
        let mut text = String::new();
        for option in self.options {
            let own_default = in_force.iter().find(|(spec, _)| spec.key == option.key);
            let value = match (self.values.get(option.key), own_default, option.default) {
                (Some(value), ..) => option.masked(value).to_string(),
                (None, Some((_, value)), _) => value.to_string(),
                (None, None, Some(default)) => default.to_owned(),
                (None, None, None) => continue,
            };
            let origin = match self.layer_of(option.key) {
                Some(Layer::Flags) => "flag".to_owned(),
                Some(Layer::Variables) => option.variable(),
                Some(Layer::File) => self.file.path.display().to_string(),
                None => "default".to_owned(),
            };
            // Fails only if writing to a string does.
            let _ = writeln!(text, "{}: {value} # {origin}", option.key);
        }
        text
    }
}
