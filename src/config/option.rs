//! Definitions of options: key, type, default, help, and the entry in the example file.

use std::fmt::Display;
use std::marker::PhantomData;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Arg, ArgAction, ValueEnum};
use serde_json::Value;

use super::{DockerSocket, MASKED, Secret};
use crate::remote::log_artifact::UploadCondition;

/// An option with values of type `T`.
pub struct Opt<T> {
    /// The description, which does not depend on the type.
    pub spec: Spec,
    value: PhantomData<fn() -> T>,
}

/// The description of an option.
pub struct Spec {
    /// The option's name in flags and files, from which the name of its variable is made.
    pub key: &'static str,
    /// The placeholder for the value in the help.
    value_name: &'static str,
    /// The description in the help and the example file.
    about: &'static str,
    /// The default; `None` if there is none, or if it depends on the machine.
    pub default: Option<&'static str>,
    /// Describes a default that depends on the machine, for the help.
    default_in_words: Option<&'static str>,
    /// The value in the example file if there is no default; `None` leaves the option out of the example.
    example: Option<&'static str>,
    /// Whether the example file sets the option although it has no default.
    is_set_in_example: bool,
    /// Another name of the flag.
    alias: Option<&'static str>,
    /// Options of one group override each other: only the first layer that sets one of them counts.
    pub group: Option<&'static str>,
    /// Whether the help leaves the option out, because this build does not support it.
    pub is_hidden: bool,
    kind: Kind,
    /// Whether messages never show the value.
    pub is_secret: bool,
    /// Checks a value, and converts it to the form in which it is shown.
    pub normalised: fn(&Value) -> Result<Value, BadValue>,
    /// Replaces the secret parts of a value.
    masked: fn(&Value) -> Value,
}

/// How an option's values are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Any text.
    Text,
    /// True or false; a flag without a value means true.
    Bool,
    /// A number. Flags accept negative numbers too, so that they are refused as values and not as unknown
    /// flags.
    Number,
    /// Several values, separated by commas in a flag and by white space in a variable.
    List,
}

/// Why a value is invalid.
#[derive(Debug)]
pub struct BadValue {
    /// The problem, without any secret.
    pub why: String,
    /// The index of the invalid entry, if the value is a list.
    pub entry: Option<usize>,
}

/// A type of option values.
pub trait OptionValue: Sized {
    /// How values are written.
    const KIND: Kind;
    /// Describes valid values, after "is not" in messages.
    const EXPECTED: &'static str;
    /// Whether messages must not show an invalid value.
    const IS_SECRET: bool = false;

    /// Parses a scalar; `word` is `None` for a list, a map or null.
    fn from_word(word: Option<&str>) -> Option<Self>;

    /// Returns the form in which the value is shown.
    fn shown(&self) -> Value;

    /// Parses a value of a layer.
    fn from_value(value: &Value) -> Result<Self, BadValue> {
        let word = word_of(value);
        Self::from_word(word.as_deref()).ok_or_else(|| {
            let found = word.filter(|_| !Self::IS_SECRET);
            let found = found.map_or_else(|| "the value".to_owned(), |word| format!("`{word}`"));
            BadValue { why: format!("{found} is not {}", Self::EXPECTED), entry: None }
        })
    }
}

/// Returns a scalar as text; `None` for a list, a map or null.
fn word_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

impl<T: OptionValue> Opt<T> {
    /// Describes an option without a default.
    pub const fn new(key: &'static str, value_name: &'static str, about: &'static str) -> Self {
        let spec = Spec {
            key,
            value_name,
            about,
            default: None,
            default_in_words: None,
            example: None,
            is_set_in_example: false,
            alias: None,
            group: None,
            is_hidden: false,
            kind: T::KIND,
            is_secret: T::IS_SECRET,
            normalised: |value| T::from_value(value).map(|value| value.shown()),
            masked: |value| if T::IS_SECRET { Value::from(MASKED) } else { value.clone() },
        };
        Self { spec, value: PhantomData }
    }

    /// Sets the default, in the notation of a file.
    #[must_use]
    pub const fn default(mut self, default: &'static str) -> Self {
        self.spec.default = Some(default);
        self
    }

    /// Describes a default that depends on the machine.
    #[must_use]
    pub const fn default_in_words(mut self, words: &'static str) -> Self {
        self.spec.default_in_words = Some(words);
        self
    }

    /// Sets the value in the example file, where it is commented out.
    #[must_use]
    pub const fn example(mut self, value: &'static str) -> Self {
        self.spec.example = Some(value);
        self
    }

    /// Sets the value in the example file, without commenting it out.
    #[must_use]
    pub const fn set_in_example(mut self, value: &'static str) -> Self {
        self.spec.is_set_in_example = true;
        self.example(value)
    }

    /// Sets another name of the flag.
    #[must_use]
    pub const fn alias(mut self, alias: &'static str) -> Self {
        self.spec.alias = Some(alias);
        self
    }

    /// Sets the group of options that override each other.
    #[must_use]
    pub const fn group(mut self, group: &'static str) -> Self {
        self.spec.group = Some(group);
        self
    }

    /// Leaves the option out of help and examples.
    #[must_use]
    pub const fn hidden(mut self) -> Self {
        self.spec.is_hidden = true;
        self
    }

    /// Sets the function that replaces the secret parts of a value.
    #[must_use]
    pub const fn masked(mut self, masked: fn(&Value) -> Value) -> Self {
        self.spec.masked = masked;
        self
    }
}

impl Spec {
    /// Returns the name of the option's variable.
    pub fn variable(&self) -> String {
        format!("{}{}", super::PREFIX, self.key.to_ascii_uppercase().replace('-', "_"))
    }

    /// Returns whether the option takes several values.
    pub fn is_list(&self) -> bool {
        self.kind == Kind::List
    }

    /// Returns whether an empty text in a file leaves the option unset.
    pub fn may_be_empty(&self) -> bool {
        self.kind == Kind::Text
    }

    /// Returns a value with its secret parts replaced.
    pub fn masked(&self, value: &Value) -> Value {
        (self.masked)(value)
    }

    /// Returns the option as a clap flag.
    pub fn flag(&self) -> Arg {
        let default = self.default.or(self.default_in_words);
        let default = default.map_or_else(String::new, |text| format!(" [default: {text}]"));
        let flag = Arg::new(self.key)
            .long(self.key)
            .value_name(self.value_name)
            .help(format!("{} [env: {}]{default}", self.about, self.variable()))
            .hide(self.is_hidden);
        let flag = match self.alias {
            Some(alias) => flag.alias(alias),
            None => flag,
        };
        match self.kind {
            Kind::Text => flag,
            Kind::Bool => flag.num_args(0..=1).default_missing_value("true"),
            Kind::Number => flag.allow_negative_numbers(true),
            Kind::List => flag.action(ArgAction::Append).value_delimiter(','),
        }
    }

    /// Returns the option's entry in the example file; `None` if it has none.
    pub fn example(&self) -> Option<String> {
        let comment = wrapped_comment(self.about);
        match (self.default, self.example) {
            (Some(default), _) => Some(format!("{comment}{}: {default}\n", self.key)),
            (None, Some(example)) => {
                let mark = if self.is_set_in_example { "" } else { "# " };
                Some(format!("{comment}{mark}{}: {example}\n", self.key))
            }
            (None, None) => None,
        }
    }
}

/// Width of comments in the example files, in characters.
const EXAMPLE_WIDTH: usize = 100;

/// Wraps `text` into comment lines of at most [`EXAMPLE_WIDTH`] characters.
fn wrapped_comment(text: &str) -> String {
    let mut lines = vec![String::from("#")];
    for word in text.split_whitespace() {
        let is_full =
            |line: &String| line.chars().count() + 1 + word.chars().count() > EXAMPLE_WIDTH;
        if lines.last().is_none_or(is_full) {
            lines.push("#".to_owned());
        }
        if let Some(line) = lines.last_mut() {
            line.push(' ');
            line.push_str(word);
        }
    }
    lines.iter().map(|line| format!("{line}\n")).collect()
}

impl OptionValue for String {
    const KIND: Kind = Kind::Text;
    const EXPECTED: &'static str = "a string";

    fn from_word(word: Option<&str>) -> Option<Self> {
        word.map(str::to_owned)
    }

    fn shown(&self) -> Value {
        self.as_str().into()
    }
}

impl OptionValue for PathBuf {
    const KIND: Kind = Kind::Text;
    const EXPECTED: &'static str = "a path (a string)";

    fn from_word(word: Option<&str>) -> Option<Self> {
        word.map(Self::from)
    }

    fn shown(&self) -> Value {
        self.to_string_lossy().into()
    }
}

impl OptionValue for Secret {
    const KIND: Kind = Kind::Text;
    const EXPECTED: &'static str = "a string";
    const IS_SECRET: bool = true;

    fn from_word(word: Option<&str>) -> Option<Self> {
        word.map(|word| Self(word.to_owned()))
    }

    fn shown(&self) -> Value {
        // The merged options need the real value; [`Spec::masked`] replaces it when they are printed.
        self.reveal().into()
    }
}

impl OptionValue for bool {
    const KIND: Kind = Kind::Bool;
    const EXPECTED: &'static str = "true or false";

    fn from_word(word: Option<&str>) -> Option<Self> {
        match word?.to_ascii_lowercase().as_str() {
            "true" | "t" | "1" => Some(true),
            "false" | "f" | "0" => Some(false),
            _ => None,
        }
    }

    fn shown(&self) -> Value {
        (*self).into()
    }
}

/// A number of seconds. 32 bits, so that adding it to an `Instant` can't overflow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seconds(pub u32);

impl Seconds {
    /// Converts the seconds to a `Duration`.
    pub fn duration(self) -> Duration {
        Duration::from_secs(self.0.into())
    }
}

/// Implements [`OptionValue`] for a type of numbers: the type, its description, a conversion from the parsed
/// number that returns `None` for invalid ones, and a conversion to JSON.
macro_rules! number {
    ($type:ty, $expected:literal, $checked:expr, $shown:expr) => {
        impl OptionValue for $type {
            const KIND: Kind = Kind::Number;
            const EXPECTED: &'static str = $expected;

            fn from_word(word: Option<&str>) -> Option<Self> {
                word?.parse().ok().and_then($checked)
            }

            fn shown(&self) -> Value {
                let shown: fn(&Self) -> Value = $shown;
                shown(self)
            }
        }
    };
}

/// The number of a file descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor(pub u32);

/// A number of at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AtLeastOne(pub usize);

number!(
    Seconds,
    "a number of seconds from 0 to 4294967295",
    |number| Some(Seconds(number)),
    |seconds| seconds.0.into()
);
number!(
    Descriptor,
    "the number of an open descriptor",
    |number| Some(Descriptor(number)),
    |number| number.0.into()
);
number!(u16, "a port number from 0 to 65535", Some::<u16>, |port| (*port).into());
number!(u32, "a number from 0 to 4294967295", Some::<u32>, |number| (*number).into());
number!(usize, "a number of bytes", Some::<usize>, |bytes| (*bytes).into());
number!(
    AtLeastOne,
    "a number of at least 1",
    |number| Some(AtLeastOne(number)).filter(|_| number > 0),
    |number| number.0.into()
);

/// Implements [`OptionValue`] for an enum that implements clap's `ValueEnum`.
macro_rules! choice {
    ($type:ty, $expected:literal) => {
        impl OptionValue for $type {
            const KIND: Kind = Kind::Text;
            const EXPECTED: &'static str = $expected;

            fn from_word(word: Option<&str>) -> Option<Self> {
                <Self as ValueEnum>::from_str(word?, false).ok()
            }

            fn shown(&self) -> Value {
                let named = self.to_possible_value();
                named.map_or(Value::Null, |value| value.get_name().into())
            }
        }
    };
}

choice!(UploadCondition, "never, always or when-trimmed");
choice!(DockerSocket, "always or never");

impl OptionValue for Vec<String> {
    const KIND: Kind = Kind::List;
    const EXPECTED: &'static str = "a sequence of strings";

    fn from_word(_: Option<&str>) -> Option<Self> {
        None
    }

    fn shown(&self) -> Value {
        self.as_slice().into()
    }

    fn from_value(value: &Value) -> Result<Self, BadValue> {
        let bad =
            |entry: Option<usize>, why: &dyn Display| BadValue { why: why.to_string(), entry };
        let Value::Array(entries) = value else {
            return Err(bad(None, &format_args!("the value is not {}", Self::EXPECTED)));
        };
        let strings = entries.iter().enumerate().map(|(index, entry)| {
            word_of(entry).ok_or_else(|| {
                bad(Some(index), &format_args!("entry {} is not a string", index + 1))
            })
        });
        strings.collect()
    }
}
