//! Decodes the values in a request: variables, files and SSH keys.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;
use serde::Deserialize;

use super::{OnlyMap, null_is_empty, problem};
use crate::job::{EnvVar, InjectedFile, Problems, VariableName};

raw!(RawEnvVar { name: String, value: Option<String> });
raw!(RawFile { path: String, content: Option<String>, mode: String });

/// Which names of variables are valid.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Names {
    /// Names of shell variables; any other name is a problem.
    Shell,
    /// Names of shell variables; a variable with any other name is skipped.
    ShellOrSkipped,
    /// All names that an environment can hold.
    Container,
}

/// Decoded variables.
pub(super) struct Environment {
    /// The variables, sorted by name, each name once.
    pub(super) variables: Vec<EnvVar>,
    /// One line of the job's log for each variable that is skipped.
    pub(super) skipped: Vec<String>,
}

/// Decodes variables. `at` is the path of the part that holds them, with its final dot; empty for
/// the request itself.
pub(super) fn decode_environment(
    at: &str,
    variables: &[OnlyMap<RawEnvVar>],
    names: Names,
) -> Result<Environment, Problems> {
    let mut problems = Problems::new();
    let mut by_name = BTreeMap::new();
    let mut skipped = BTreeSet::new();
    for (i, OnlyMap(raw)) in variables.iter().enumerate() {
        let (name, rule) = match names {
            Names::Container => {
                (VariableName::for_container(&raw.name), "not empty, and no `=` or NUL")
            }
            _ => (VariableName::new(&raw.name), "letters, digits and _ only, and no digit first"),
        };
        if names == Names::ShellOrSkipped && name.is_none() {
            skipped.insert(format!(
                "Skipping {}: no shell can hold a variable of this name\n",
                shown_name(&raw.name)
            ));
            continue;
        }
        if names != Names::Container && name.as_ref().is_some_and(VariableName::is_the_shells_own) {
            skipped.insert(format!("Skipping {}: the shell sets this variable itself\n", raw.name));
            continue;
        }
        let name = name.ok_or_else(|| {
            problem(
                format!("{at}env_vars[{i}].name"),
                format!("invalid variable name `{}`: {rule}", shown_name(&raw.name)),
            )
        });
        let value = decode_base64(raw.value.as_deref().unwrap_or_default()).map_err(|why| {
            problem(
                format!("{at}env_vars[{i}].value"),
                format!("the value of `{}` {why}", shown_name(&raw.name)),
            )
        });
        let value = value.and_then(|value| {
            let contains_nul = memchr::memchr(0, &value).is_some();
            let refused = || {
                problem(
                    format!("{at}env_vars[{i}].value"),
                    format!(
                        "the value of `{}` contains a NUL byte, which no environment can hold",
                        shown_name(&raw.name)
                    ),
                )
            };
            if contains_nul { Err(refused()) } else { Ok(value) }
        });
        match (name, value) {
            (Ok(name), Ok(value)) => {
                by_name.insert(name, value);
            }
            (name, value) => problems.extend(name.err().into_iter().chain(value.err())),
        }
    }
    let variables = by_name.into_iter().map(|(name, value)| EnvVar { name, value }).collect();
    let skipped = skipped.into_iter().collect();
    if problems.is_empty() { Ok(Environment { variables, skipped }) } else { Err(problems) }
}

/// Returns a name for messages, without what follows a `=`: that may be a secret in the wrong
/// place.
fn shown_name(name: &str) -> String {
    match name.split_once('=') {
        Some((name, _)) => format!("{}=…", name.escape_debug()),
        None => name.escape_debug().to_string(),
    }
}

pub(super) fn decode_files(
    at: &str,
    files: &[OnlyMap<RawFile>],
    octal_modes: bool,
) -> Result<Vec<InjectedFile>, Problems> {
    let mut problems = Problems::new();
    let mut decoded = Vec::with_capacity(files.len());
    for (i, OnlyMap(raw)) in files.iter().enumerate() {
        if raw.path.is_empty() || raw.path.contains('\0') {
            problems.push(problem(
                format!("{at}files[{i}].path"),
                "a path must not be empty or hold a NUL",
            ));
        }
        if octal_modes && parse_octal_mode(&raw.mode).is_none() {
            problems.push(problem(
                format!("{at}files[{i}].mode"),
                format!(
                    "bad file permission '{}' for {}: an octal mode like 0644 is needed",
                    raw.mode.escape_debug(),
                    raw.path.escape_debug()
                ),
            ));
        }
        match decode_base64(raw.content.as_deref().unwrap_or_default()) {
            Ok(content) => decoded.push(InjectedFile {
                path: raw.path.clone(),
                content,
                mode: raw.mode.clone(),
            }),
            Err(why) => problems.push(problem(
                format!("{at}files[{i}].content"),
                format!("the content of `{}` {why}", raw.path.escape_debug()),
            )),
        }
    }
    if problems.is_empty() { Ok(decoded) } else { Err(problems) }
}

pub(super) fn decode_ssh_keys(keys: &[String]) -> Result<Vec<Bytes>, Problems> {
    let mut problems = Problems::new();
    let mut lines = Vec::with_capacity(keys.len());
    for (i, key) in keys.iter().enumerate() {
        let path = || format!("ssh_public_keys[{i}]");
        match decode_base64(key) {
            Ok(line) if memchr::memchr(0, &line).is_some() => {
                problems.push(problem(path(), "the key contains a NUL byte"));
            }
            Ok(line) => lines.push(line),
            Err(why) => problems.push(problem(path(), format!("the key {why}"))),
        }
    }
    if problems.is_empty() { Ok(lines) } else { Err(problems) }
}

/// Parses permission bits: octal digits, with a value of at most 7777.
pub fn parse_octal_mode(mode: &str) -> Option<u32> {
    let digits_only = !mode.is_empty() && mode.bytes().all(|b| b.is_ascii_digit());
    let bits = u32::from_str_radix(mode, 8).ok()?;
    (digits_only && bits <= 0o7777).then_some(bits)
}

/// Decodes base64 with or without padding, and with white space anywhere.
fn decode_base64(text: &str) -> Result<Bytes, &'static str> {
    const LENIENT: GeneralPurpose = GeneralPurpose::new(
        &base64::alphabet::STANDARD,
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
    );
    let compact: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    LENIENT.decode(compact).map(Bytes::from).map_err(|_| "is not base64")
}
