//! What serde says about wrong input, fit for people and logs.

use serde::{Deserialize, Deserializer};

/// How many fields are named that are not known.
const MOST_NAMED: usize = 5;

/// How much of their names is shown, in bytes.
const SHOWN: usize = 300;

/// Reads a job request, and has the agent's log name the fields in it that are ignored, as an agent does not know what
/// later platforms send. Their values are in no log.
pub(crate) fn naming_unknown<'de, D, T>(input: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let (mut named, mut count) = (Vec::new(), 0_usize);
    let read = serde_ignored::deserialize(input, |path| {
        count += 1;
        if named.len() < MOST_NAMED {
            named.push(spelled(&path));
        }
    });
    if count > 0 {
        let fields = named.join(", ");
        let fields = &fields[..fields.floor_char_boundary(SHOWN)];
        log::info!(fields, count; "fields of a job request are not known here, and ignored");
    }
    read
}

/// Writes `env_vars[2].name`.
fn spelled(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}[{index}]", spelled(parent)),
        Path::Map { parent, key } => match spelled(parent) {
            before if before.is_empty() => key.clone(),
            before => format!("{before}.{key}"),
        },
        Path::Some { parent }
        | Path::NewtypeStruct { parent }
        | Path::NewtypeVariant { parent } => spelled(parent),
    }
}

/// Takes the value out of serde's words about a wrong type: it may be a secret.
pub(crate) fn without_value(message: &str) -> String {
    const KINDS: [&str; 6] =
        ["string", "integer", "floating point", "boolean", "character", "byte array"];
    let redacted = ["invalid type: ", "invalid value: "].iter().find_map(|start| {
        let (before, found) = message.split_once(start)?;
        let (found, expected) = found.rsplit_once(", expected ")?;
        let kind = KINDS.iter().find(|kind| found.starts_with(**kind))?;
        Some(format!("{before}{start}{kind}, expected {expected}"))
    });
    redacted.unwrap_or_else(|| message.to_owned())
}
