//! Reads a job from a file in YAML or JSON, and reports problems with their lines.

mod bounds;

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use actors::job::Job;
use actors::request::{FileRequest, OnlyMap, known_fields};
use serde::de::{Deserializer, IgnoredAny};

use self::bounds::{MAX_EXPANDED, MAX_NESTING, deepest_nesting, expands_too_much};
use crate::decode::place::{Segment, line_in_json, line_in_yaml, may_merge};
use crate::decode::{decode, decode_json, without_value};

/// Limit for the size of a job file, in bytes.
pub const MAX_SIZE: u64 = 32 * 1024 * 1024;

/// How many warnings or problems are listed. Finding the line of each one takes another parse.
const MOST_LISTED: usize = 20;

/// Where a job comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Standard input, called `-`.
    Stdin,
    /// A file.
    File(PathBuf),
}

impl From<&Path> for Source {
    fn from(path: &Path) -> Self {
        if path == Path::new("-") { Self::Stdin } else { Self::File(path.to_owned()) }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdin => f.write_str("standard input"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A valid job, and warnings for its author.
#[derive(Debug)]
pub struct JobFile {
    /// The job, which has no problems.
    pub job: Job,
    /// Warnings with their places, one line each.
    pub warnings: Vec<String>,
}

/// Why a job file can't be run.
#[derive(Debug, thiserror::Error)]
pub enum JobFileError {
    /// The file can't be read.
    #[error("{from}: can't be read")]
    Unreadable {
        /// The file.
        from: Source,
        /// The system's reason.
        source: io::Error,
    },
    /// The path is a directory.
    #[error("{from}: is a directory, not a job file in YAML or JSON")]
    Directory {
        /// The file.
        from: Source,
    },
    /// The file is larger than [`MAX_SIZE`].
    #[error("{from}: is larger than {} MiB, the limit for job files", MAX_SIZE / 1024 / 1024)]
    TooLarge {
        /// The file.
        from: Source,
    },
    /// The file is not UTF-8.
    #[error("{from}: is not text: byte {offset} is not UTF-8")]
    NotText {
        /// The file.
        from: Source,
        /// The offset of the first invalid byte.
        offset: usize,
    },
    /// The file has no content but white space.
    #[error("{from}: is empty; a job needs at least a `job_id`")]
    Empty {
        /// The file.
        from: Source,
    },
    /// The file is not YAML or JSON, or a field has the wrong type.
    #[error("{from}: {what}")]
    Syntax {
        /// The file.
        from: Source,
        /// The problem with its place (path, line and column).
        what: String,
    },
    /// Fields have invalid values.
    #[error("{}", what.join("\n"))]
    Invalid {
        /// One line for each problem, with its place.
        what: Vec<String>,
    },
}

/// How to treat unknown fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnknownFields {
    /// As problems: with a misspelt `commands`, a job would pass without doing anything.
    Refused,
    /// As warnings.
    Warned,
}

/// Reads and checks a job. The error lists all unknown, missing and invalid fields.
pub fn read(from: &Source, unknown_fields: UnknownFields) -> Result<JobFile, JobFileError> {
    let text = read_text(from)?;
    if text.trim().is_empty() {
        return Err(JobFileError::Empty { from: from.clone() });
    }
    let format = Format::detect(&text);
    let mut unknown = Vec::new();
    let mut request = format
        .request(&text, &mut unknown)
        .map_err(|what| JobFileError::Syntax { from: from.clone(), what })?;

    let omissions = request.take_omissions();
    let place_at = |line: Option<usize>| match line {
        Some(line) => format!("{from}:{line}"),
        None => from.to_string(),
    };
    let place = |path: &[Segment]| place_at(format.locate(&text, path));
    unknown.retain(|path| !is_extension(path));
    let replaced = request.replaced_variables();
    let unknown_lines: Vec<_> = unknown
        .iter()
        .take(MOST_LISTED + 1)
        .map(|path| format!("{}: unknown field {}", place(path), describe_unknown(path)))
        .collect();
    let is_refused = unknown_fields == UnknownFields::Refused && !unknown.is_empty();
    let replaced_lines = replaced.iter().take(MOST_LISTED + 1).map(|index| {
        let path = [Segment::key("env_vars"), Segment::Index(*index), Segment::key("name")];
        let name = request.variable_name(*index).escape_debug().to_string();
        let place = place(&path);
        format!("{place}: variable `{name}` is set again further down; the last one wins")
    });
    let replaced_lines: Vec<_> = replaced_lines.collect();
    let invalid = |what: Vec<String>| JobFileError::Invalid { what };
    let job = request.decode().map_err(|error| invalid(vec![format!("{from}: {error}")]))?;
    let listed = omissions.iter().chain(job.problems()).take(MOST_LISTED + 1);
    let mut listed: Vec<_> = listed
        .map(|problem| (format.locate(&text, &Segment::parse(&problem.path)), problem))
        .collect();
    listed.sort_by_key(|(line, _)| *line);
    let mut problems: Vec<_> = listed
        .into_iter()
        .map(|(line, problem)| format!("{}: {problem}", place_at(line)))
        .collect();
    let mut count = omissions.len() + job.problems().count();
    if !job.has_commands() {
        problems.push(format!(
            "{from}: the job has no command: `commands` must be a list of at least one"
        ));
        count += 1;
    }
    if count > 0 || is_refused {
        let refused = if is_refused { unknown_lines } else { Vec::new() };
        let all = count + if is_refused { unknown.len() } else { 0 };
        let mut what = first_of(all, refused.into_iter().chain(problems), from);
        if is_refused {
            what.push(format!(
                "{from}: `--lenient` ignores unknown fields; names that begin with `x-` are always ignored"
            ));
        }
        return Err(invalid(what));
    }
    let all = unknown.len() + replaced.len();
    let warnings = first_of(all, unknown_lines.into_iter().chain(replaced_lines), from);
    Ok(JobFile { job, warnings })
}

/// Returns whether a field belongs to another tool: its name, or that of a part above it, begins with `x-`.
fn is_extension(path: &[Segment]) -> bool {
    path.iter().any(|segment| matches!(segment, Segment::Key(key) if key.starts_with("x-")))
}

/// Returns the first of `all` lines, and a line with the number of the others.
fn first_of(all: usize, lines: impl Iterator<Item = String>, from: &Source) -> Vec<String> {
    let mut listed: Vec<String> = lines.take(MOST_LISTED).collect();
    if all > listed.len() {
        listed.push(format!("{from}: and {} more", all - listed.len()));
    }
    listed
}

fn read_text(from: &Source) -> Result<String, JobFileError> {
    let unreadable = |source| JobFileError::Unreadable { from: from.clone(), source };
    let mut bytes = Vec::new();
    let limited = match from {
        Source::Stdin => io::stdin().take(MAX_SIZE + 1).read_to_end(&mut bytes),
        Source::File(path) => {
            let file = File::open(path).map_err(unreadable)?;
            if file.metadata().map_err(unreadable)?.is_dir() {
                return Err(JobFileError::Directory { from: from.clone() });
            }
            file.take(MAX_SIZE + 1).read_to_end(&mut bytes)
        }
    };
    limited.map_err(unreadable)?;
    if bytes.len() as u64 > MAX_SIZE {
        return Err(JobFileError::TooLarge { from: from.clone() });
    }
    let text = String::from_utf8(bytes).map_err(|error| JobFileError::NotText {
        from: from.clone(),
        offset: error.utf8_error().valid_up_to(),
    })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// Formats the path of an unknown field, with a similar known field as a suggestion.
fn describe_unknown(path: &[Segment]) -> String {
    let whole = Segment::join(path);
    let Some(Segment::Key(name)) = path.last() else {
        return format!("`{whole}`");
    };
    let part = path[..path.len() - 1].iter().rev().find_map(|segment| match segment {
        Segment::Key(key) => Some(key.as_str()),
        Segment::Index(_) => None,
    });
    let nearest = known_fields(part)
        .iter()
        .map(|known| (strsim::damerau_levenshtein(name, known), known))
        .min()
        .filter(|(distance, _)| *distance <= 1 + name.len() / 4);
    match nearest {
        Some((_, known)) => format!("`{whole}`; did you mean `{known}`?"),
        None => format!("`{whole}`"),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Json,
    Yaml,
}

impl Format {
    /// Guesses the format. Text in braces or brackets is JSON, unless it parses only as YAML.
    fn detect(text: &str) -> Self {
        let braces = text.trim_start().starts_with(['{', '[']);
        let is_json = |text| match serde_json::from_str::<IgnoredAny>(text) {
            Ok(_) => true,
            Err(_) if deepest_nesting(text) > MAX_NESTING => true,
            Err(_) => serde_yaml::from_str::<IgnoredAny>(text).is_err(),
        };
        if braces && is_json(text) { Self::Json } else { Self::Yaml }
    }

    fn request(self, text: &str, unknown: &mut Vec<Vec<Segment>>) -> Result<FileRequest, String> {
        match self {
            Self::Json => {
                decode_json(text.as_bytes(), |tracked| collecting_unknown(tracked, unknown))
                    .map_err(|error| error.to_string())
            }
            Self::Yaml if deepest_nesting(text) > MAX_NESTING => {
                Err(format!("nested more than {MAX_NESTING} levels deep"))
            }
            Self::Yaml if expands_too_much(text) => {
                Err(format!("aliases expand to more than {} MiB", MAX_EXPANDED >> 20))
            }
            Self::Yaml if may_merge(text) => merged_request(text, unknown),
            Self::Yaml => {
                let input = serde_yaml::Deserializer::from_str(text);
                collecting_unknown(input, unknown).map_err(|error| {
                    let what = without_value(&error.to_string());
                    // For an error at the very first character the parser gives no place.
                    if error.location().is_some_and(|at| at.index() > 0) {
                        what
                    } else {
                        format!("{what} at line 1")
                    }
                })
            }
        }
    }

    /// Returns the line of the last key in `path`, 1 based.
    fn locate(self, text: &str, path: &[Segment]) -> Option<usize> {
        match self {
            Self::Json => line_in_json(text, path),
            Self::Yaml => line_in_yaml(text, path),
        }
    }
}

/// Returns whether there is a merge key anywhere in `value`.
fn has_merge_key(value: &serde_yaml::Value) -> bool {
    match value {
        serde_yaml::Value::Mapping(mapping) => {
            mapping.iter().any(|(key, value)| key.as_str() == Some("<<") || has_merge_key(value))
        }
        serde_yaml::Value::Sequence(sequence) => sequence.iter().any(has_merge_key),
        serde_yaml::Value::Tagged(tagged) => has_merge_key(&tagged.value),
        _ => false,
    }
}

/// Decodes YAML with merge keys. Errors name paths instead of lines, as a merged entry occurs at several
/// lines.
fn merged_request(text: &str, unknown: &mut Vec<Vec<Segment>>) -> Result<FileRequest, String> {
    let whole = |error: serde_yaml::Error| without_value(&error.to_string());
    let mut merged: serde_yaml::Value = serde_yaml::from_str(text).map_err(whole)?;
    let bad_merge = |error| {
        let line = text
            .lines()
            .position(|line| line.trim_start().trim_start_matches("- ").starts_with("<<"));
        let line = line.map_or_else(String::new, |line| format!(" at line {}", line + 1));
        format!("a merge key `<<` needs a mapping, or a list of mappings: {}{line}", whole(error))
    };
    // Merged mappings may contain merge keys themselves.
    for _ in 0..MAX_NESTING {
        if !has_merge_key(&merged) {
            break;
        }
        merged.apply_merge().map_err(bad_merge)?;
    }
    decode(merged, |tracked| collecting_unknown(tracked, unknown))
        .map_err(|error| error.to_string())
}

fn collecting_unknown<'de, D>(
    input: D,
    unknown: &mut Vec<Vec<Segment>>,
) -> Result<FileRequest, D::Error>
where
    D: Deserializer<'de>,
{
    let request = serde_ignored::deserialize(input, |path| unknown.push(Segment::path_from(&path)));
    request.map(|OnlyMap(request)| request)
}

#[cfg(test)]
mod tests;
