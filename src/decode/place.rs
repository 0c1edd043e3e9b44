//! Paths to values in YAML and JSON, and the lines of these values.

use std::cell::Cell;
use std::fmt;

use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

/// Pairs of a field's name and another name that files may use for it.
const ALIASES: [(&str, &str); 3] =
    [("job_id", "id"), ("files", "file"), ("epilogue_always_commands", "epilogue_commands")];

/// One step from a value into one of its parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Segment {
    Key(String),
    Index(usize),
}

impl Segment {
    pub(crate) fn key(name: &str) -> Self {
        Self::Key(name.to_owned())
    }

    pub(crate) fn path_from(path: &serde_ignored::Path<'_>) -> Vec<Self> {
        use serde_ignored::Path;
        let (parent, own) = match path {
            Path::Root => return Vec::new(),
            Path::Seq { parent, index } => (parent, Some(Self::Index(*index))),
            Path::Map { parent, key } => (parent, Some(Self::Key(key.clone()))),
            Path::Some { parent }
            | Path::NewtypeStruct { parent }
            | Path::NewtypeVariant { parent } => (parent, None),
        };
        let mut segments = Self::path_from(parent);
        segments.extend(own);
        segments
    }

    /// Parses a path like `env_vars[2].name`.
    pub(crate) fn parse(path: &str) -> Vec<Self> {
        let parts = path.split(['.', '[']).map(|part| part.trim_end_matches(']'));
        parts.map(|part| part.parse().map_or_else(|_| Self::key(part), Self::Index)).collect()
    }

    /// Formats a path like `env_vars[2].name`.
    pub(crate) fn join(path: &[Self]) -> String {
        let mut joined = String::new();
        for segment in path {
            match segment {
                Self::Index(index) => joined.extend(["[", &index.to_string(), "]"]),
                Self::Key(key) if joined.is_empty() => joined.push_str(key),
                Self::Key(key) => joined.extend([".", key]),
            }
        }
        joined.escape_debug().to_string()
    }
}

/// Returns the line of the last key or index of `path` in JSON, 1 based.
pub(crate) fn line_in_json(text: &str, path: &[Segment]) -> Option<usize> {
    let seek = Seek { path, found: &Cell::new(false) };
    let error = seek.deserialize(&mut serde_json::Deserializer::from_str(text)).err()?;
    Some(error.line())
}

/// Returns the line of the last key or index of `path` in YAML, 1 based. For a key that a merge key (`<<`)
/// brings in, this is the line in the merged mapping.
pub(crate) fn line_in_yaml(text: &str, path: &[Segment]) -> Option<usize> {
    let found = Cell::new(false);
    let seek = Seek { path, found: &found };
    let error = seek.deserialize(serde_yaml::Deserializer::from_str(text)).err()?;
    match path.last() {
        Some(Segment::Key(key)) if !found.get() && may_merge(text) => {
            first_line_with_key(text, key)
        }
        _ => error.location().map(|location| location.line()),
    }
}

/// Returns whether YAML may contain a merge key (`<<`), which copies the entries of other mappings. Quick,
/// with false positives.
pub(crate) fn may_merge(text: &str) -> bool {
    text.contains("<<")
}

/// Returns the first line of YAML, 1 based, that sets a key of this name anywhere.
fn first_line_with_key(text: &str, key: &str) -> Option<usize> {
    let is_part_of_name = |c: char| c.is_alphanumeric() || "_-".contains(c);
    let sets = |line: &str| {
        line.match_indices(key).any(|(at, _)| {
            let (before, after) = (&line[..at], &line[at + key.len()..]);
            !before.contains('#')
                && !before.ends_with(is_part_of_name)
                && after.trim_start_matches(['"', '\'', ' ']).starts_with(':')
        })
    };
    text.lines().position(sets).map(|index| index + 1)
}

/// Follows a path, and fails on purpose at its last key or index, as parsers report the line of an error.
#[derive(Clone, Copy)]
struct Seek<'a> {
    path: &'a [Segment],
    /// Set when the last key of the path was found.
    found: &'a Cell<bool>,
}

impl<'de> DeserializeSeed<'de> for Seek<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<(), D::Error> {
        input.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seek<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a part of the path")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (wanted, below) = match self.path.split_first() {
            Some((Segment::Key(key), below)) => (key.as_str(), below),
            _ => ("", self.path),
        };
        let last = below.is_empty().then_some(self.found);
        while let Some(found) = map.next_key_seed(Key { wanted, last })? {
            if found {
                map.next_value_seed(Seek { path: below, ..self })?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let Some((Segment::Index(wanted), below)) = self.path.split_first() else {
            return Ok(());
        };
        for _ in 0..*wanted {
            list.next_element::<IgnoredAny>()?;
        }
        list.next_element_seed(Seek { path: below, ..self })?;
        Err(A::Error::custom("passed"))
    }
}

/// Compares a key with the wanted one. If it matches and is the last of the path, fails on purpose.
#[derive(Clone, Copy)]
struct Key<'a> {
    wanted: &'a str,
    /// Set at a match; `None` unless the wanted key is the last of the path.
    last: Option<&'a Cell<bool>>,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<bool, D::Error> {
        input.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: serde::de::Error>(self, key: &str) -> Result<bool, E> {
        let found = key == self.wanted || ALIASES.contains(&(self.wanted, key));
        match self.last.filter(|_| found) {
            Some(last) => {
                last.set(true);
                Err(E::custom("found"))
            }
            None => Ok(found),
        }
    }
}
