//! Merges the options of flags, variables and a file, and keeps the origin of each value.

use std::fmt::{Display, Write as _};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use actors::errors::Cause;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, FromArgMatches};
use serde_json::{Map, Value};

use super::common::CONFIG_FILE;
use super::file::{AnyValue, OptionsInFile};
use super::option::{BadValue, Opt, OptionValue, Spec};
use super::{ConfigError, PREFIX, nearest};
use crate::decode::place::{Segment, line_in_yaml};
use crate::decode::without_value;
use crate::service::environment::Environment;

/// Variables with the prefix of options that are not options, and so cause no warning.
const OTHER_VARIABLES: [&str; 4] = [
    "SEMAPHORE_AGENT_LOG_LEVEL",
    "SEMAPHORE_AGENT_LOG_FILE_PATH",
    "SEMAPHORE_AGENT_LOG_MAX_SIZE",
    "SEMAPHORE_AGENT_LOGS_COMPRESSION_SIZE",
];

/// The flag that shows the configuration instead of using it.
const PRINT_CONFIG: &str = "print-config";

/// The options of one mode.
pub trait OptionSet {
    /// The options in the order of the help.
    const OPTIONS: &'static [&'static Spec];
    /// Whether a file can set the options.
    const HAS_FILE: bool;
}

/// The options of `S` that the command line sets.
#[derive(Clone, Debug)]
pub struct Flags<S> {
    values: Map<String, Value>,
    /// Show the configuration instead of using it.
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
        command.arg(print.help("Show the options in force, and where each value comes from"))
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
                // Clap turns `--key=` into one empty entry.
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

/// The places where options are set. Earlier ones override later ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layer {
    Flags,
    Variables,
    File,
}

/// The configuration file, kept to find the lines of its options.
#[derive(Default)]
struct OptionsFile {
    path: PathBuf,
    text: String,
}

/// The merged options.
pub struct Settings {
    options: &'static [&'static Spec],
    values: Map<String, Value>,
    origins: Vec<(&'static str, Layer)>,
    file: OptionsFile,
    /// Warnings for the operator.
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

    /// Returns the options that are set by variables. Adds a warning for each unknown variable with the
    /// prefix of options.
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
                self.warnings.push(format!("unknown variable {name}; did you mean {nearest}?"));
                continue;
            };
            let value = value.to_str();
            let value = value.ok_or_else(|| ConfigError::new(name, "is not UTF-8"))?;
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
        let refuse = |cause: Cause| ConfigError::new(path.display().to_string(), cause);
        let text = std::fs::read_to_string(path).map_err(|error| refuse(error.into()))?;
        // Some editors begin a file with a byte order mark.
        let text = text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text);
        let OptionsInFile(set) = serde_yaml::from_str(&text)
            .map_err(|error| refuse(without_value(&error.to_string()).into()))?;
        self.file = OptionsFile { path: path.to_owned(), text };
        let mut values = Map::new();
        for (key, AnyValue(value)) in set {
            let Some(option) = self.spec(&key) else {
                let known = self.options.iter().map(|option| option.key);
                let known = nearest(&key, known).unwrap_or_default();
                let place = self.at_line(&[Segment::key(&key)]);
                let why = format!("unknown key `{key}`{place}; did you mean `{known}`?");
                return Err(refuse(why.into()));
            };
            // Configuration templates contain keys without a value.
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
            return Err(refuse(format!("{key}: can't be set in the file itself{place}").into()));
        }
        self.add(Layer::File, values)
    }

    fn mentions_secret_option(&self, text: &str) -> bool {
        self.options.iter().any(|option| option.is_secret && text.contains(option.key))
    }

    /// Adds a layer, which the layers added before override.
    fn add(&mut self, layer: Layer, values: Map<String, Value>) -> Result<(), ConfigError> {
        let already_set: Vec<&str> = self.origins.iter().map(|(key, _)| *key).collect();
        for (key, value) in values {
            let Some(option) = self.spec(&key) else { continue };
            let overrides = |other: &&Spec| {
                other.key == key || other.group.is_some() && other.group == option.group
            };
            let earlier = already_set.iter().filter_map(|key| self.spec(key));
            let is_overridden = earlier.into_iter().any(|earlier| overrides(&earlier));
            let normalised = (option.normalised)(&value).map_err(|bad| {
                // In YAML a missing space or colon joins neighbouring lines into one value, which may then
                // contain a secret option. Such a value is not shown.
                let may_hold_secret =
                    value.as_str().is_some_and(|text| self.mentions_secret_option(text));
                let without_value =
                    (option.normalised)(&Value::Null).err().filter(|_| may_hold_secret);
                self.refuse_in(layer, option.key, &without_value.unwrap_or(bad))
            })?;
            if !is_overridden {
                self.origins.push((option.key, layer));
                self.values.insert(key, normalised);
            }
        }
        Ok(())
    }

    /// Returns the value of an option, or its default; `None` if it has neither.
    pub fn get<T: OptionValue>(&self, option: &Opt<T>) -> Option<T> {
        let default = option.spec.default.map(Value::from);
        let value = self.values.get(option.spec.key).or(default.as_ref())?;
        T::from_value(value).ok()
    }

    /// Returns the value of an option, its default, or an empty value.
    pub fn get_or_empty<T: OptionValue + Default>(&self, option: &Opt<T>) -> T {
        self.get(option).unwrap_or_default()
    }

    /// Returns whether any layer sets an option.
    pub fn is_set(&self, spec: &Spec) -> bool {
        self.values.contains_key(spec.key)
    }

    fn layer_of(&self, key: &str) -> Option<Layer> {
        self.origins.iter().find(|(known, _)| *known == key).map(|(_, layer)| *layer)
    }

    /// Returns an error about the value of an option that names the flag, the variable, or the line of the
    /// file.
    pub fn refuse(&self, spec: &Spec, why: impl Display) -> ConfigError {
        let bad = BadValue { why: why.to_string(), entry: None };
        match self.layer_of(spec.key) {
            Some(layer) => self.refuse_in(layer, spec.key, &bad),
            None => ConfigError::new(spec.key, bad.why),
        }
    }

    fn refuse_in(&self, layer: Layer, key: &str, bad: &BadValue) -> ConfigError {
        let why = bad.why.as_str();
        match layer {
            Layer::Flags => ConfigError::new(format!("--{key}"), why),
            Layer::Variables => {
                let variable = self.spec(key).map(Spec::variable).unwrap_or_default();
                ConfigError::new(variable, why)
            }
            Layer::File => {
                let entry = bad.entry.map(Segment::Index);
                let place: Vec<_> = [Segment::key(key)].into_iter().chain(entry).collect();
                let line = self.at_line(&place);
                let file = self.file.path.display();
                ConfigError::new(format!("{file}: {key}"), format!("{why}{line}"))
            }
        }
    }

    /// Returns ` at line N` for a place in the file; an empty text if the line is not known.
    fn at_line(&self, place: &[Segment]) -> String {
        let line = line_in_yaml(&self.file.text, place);
        line.map_or_else(String::new, |line| format!(" at line {line}"))
    }

    /// Formats all options as a configuration file, with their origins as comments. `computed_defaults` are
    /// the defaults that depend on this machine.
    pub fn printed(&self, computed_defaults: &[(&Spec, Value)]) -> String {
        let mut text = String::new();
        for option in self.options {
            let computed = computed_defaults.iter().find(|(spec, _)| spec.key == option.key);
            let value = match (self.values.get(option.key), computed, option.default) {
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
            // Writing to a string never fails.
            let _ = writeln!(text, "{}: {value} # {origin}", option.key);
        }
        text
    }
}
