//! What serde says about wrong input, fit for people and logs.

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
