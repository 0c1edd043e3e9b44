//! Decodes external input. Errors name the place of the problem and never show a value, which may be a
//! secret.

pub(crate) mod place;

use serde::{Deserialize, Deserializer};

/// A deserializer that tracks its path in the input.
pub(crate) type Tracked<'a, 'b, D> = serde_path_to_error::Deserializer<'a, 'b, D>;

/// A JSON deserializer that tracks its path in the input.
pub(crate) type TrackedJson<'a, 'b, 'json, 'de> =
    Tracked<'a, 'b, &'json mut serde_json::Deserializer<serde_json::de::SliceRead<'de>>>;

/// Why input could not be decoded, with the path to the problem if it is known.
#[derive(Debug, thiserror::Error)]
#[error("{}{}", place.as_ref().map(|place| format!("{place}: ")).unwrap_or_default(), without_value(&cause.to_string()))]
pub(crate) struct DecodeError<E: std::error::Error + 'static> {
    place: Option<String>,
    /// Not the error's `source`, whose text would be shown: it may contain a value.
    cause: E,
}

impl DecodeError<serde_json::Error> {
    /// Returns whether the input is valid JSON of the wrong shape.
    pub(crate) fn is_data(&self) -> bool {
        self.cause.is_data()
    }
}

/// Decodes `input` with `read`.
pub(crate) fn decode<'de, D, T>(
    input: D,
    read: impl FnOnce(Tracked<'_, '_, D>) -> Result<T, D::Error>,
) -> Result<T, DecodeError<D::Error>>
where
    D: Deserializer<'de>,
    D::Error: std::error::Error + 'static,
{
    let mut track = serde_path_to_error::Track::new();
    read(Tracked::new(input, &mut track)).map_err(|cause| {
        let place = Some(track.path().to_string()).filter(|place| place != ".");
        DecodeError { place, cause }
    })
}

/// Decodes `json` with `read`. Fails if anything follows the value.
pub(crate) fn decode_json<'de, T>(
    json: &'de [u8],
    read: impl FnOnce(TrackedJson<'_, '_, '_, 'de>) -> Result<T, serde_json::Error>,
) -> Result<T, DecodeError<serde_json::Error>> {
    let mut input = serde_json::Deserializer::from_slice(json);
    let decoded = decode(&mut input, read)?;
    input.end().map_err(|cause| DecodeError { place: None, cause })?;
    Ok(decoded)
}

/// How many unknown fields of a job request are logged by name.
const MOST_NAMED: usize = 5;

/// Limit for the names of unknown fields in one log line, in bytes.
const LONGEST_NAMES: usize = 300;

/// Decodes a job request. Unknown fields, which newer platforms may send, are ignored and logged by name,
/// without their values.
pub(crate) fn naming_unknown<'de, D, T>(input: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let (mut named, mut count) = (Vec::new(), 0_usize);
    let read = serde_ignored::deserialize(input, |path| {
        count += 1;
        if named.len() < MOST_NAMED {
            named.push(format_path(&path));
        }
    });
    if count > 0 {
        let fields = named.join(", ");
        let fields = &fields[..fields.floor_char_boundary(LONGEST_NAMES)];
        log::info!(fields, count; "ignoring unknown fields of a job request");
    }
    read
}

/// Formats a path like `env_vars[2].name`.
fn format_path(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}[{index}]", format_path(parent)),
        Path::Map { parent, key } => match format_path(parent) {
            before if before.is_empty() => key.clone(),
            before => format!("{before}.{key}"),
        },
        Path::Some { parent }
        | Path::NewtypeStruct { parent }
        | Path::NewtypeVariant { parent } => format_path(parent),
    }
}

/// Removes the value from serde's message about a wrong type, as it may be a secret.
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

#[cfg(test)]
mod tests {
    use actors::errors::WithCauses;
    use serde::Deserialize as _;

    use super::*;

    #[test]
    fn an_error_shown_with_its_causes_has_no_value() {
        let error =
            decode_json(br#"["hunter2"]"#, |input| Vec::<u32>::deserialize(input)).unwrap_err();
        let shown = WithCauses(&error).to_string();
        assert!(shown.starts_with("[0]: invalid type: string, expected u32"), "{shown}");
        assert!(!shown.contains("hunter2"));
    }
}
