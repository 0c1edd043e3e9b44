//! The agent's own log: written to standard output and to a file, which is rotated by size.
//!
//! An entry is one line: time, level, a constant message, then key-value pairs. Values are escaped, so that
//! no value can forge a line. The log never contains secrets, tokens or values of job variables.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::{Duration, SystemTime};

use actors::errors::ErrorOf;
use env_logger::{Builder, Target};
use log::kv::{self, Key, Value, VisitSource};
use log::{LevelFilter, Record};
use nix::libc::{O_NOFOLLOW, O_NONBLOCK};
use nix::unistd::geteuid;

use crate::service::environment::Environment;

const LEVEL: &str = "SEMAPHORE_AGENT_LOG_LEVEL";
const PATH: &str = "SEMAPHORE_AGENT_LOG_FILE_PATH";
const MAX_SIZE: &str = "SEMAPHORE_AGENT_LOG_MAX_SIZE";
const DEFAULT_MAX_SIZE: u64 = 10 << 20;

/// Maximum number of lines queued for standard output; further lines are dropped, because a slow reader must
/// not block the agent.
const QUEUED_LINES: usize = 4096;

/// How long the agent's exit may wait until the queued lines are on standard output.
const FLUSH_PATIENCE: Duration = Duration::from_secs(1);

/// Path, size limit and level of the agent's own log.
#[derive(Clone, Debug)]
pub struct AgentLogConfig {
    /// Path of the log file.
    pub path: PathBuf,
    /// The size at which the file is rotated, in bytes.
    pub max_size: u64,
    level: LevelFilter,
}

impl AgentLogConfig {
    /// Reads the configuration from the environment. Defaults: `agent_log` in the directory for temporary
    /// files, 10 MiB, level `info`.
    pub fn from_env(environment: &Environment) -> Result<Self, ErrorOf> {
        let level = environment.get(LEVEL).map_or(Ok(LevelFilter::Info), |level| {
            let level = level.to_string_lossy().into_owned();
            let known = "error, warn, info, debug, trace, off";
            level
                .parse()
                .map_err(|_| ErrorOf::new(LEVEL, format!("`{level}` is not one of: {known}")))
        })?;
        let max_size = environment.get(MAX_SIZE).map_or(Ok(DEFAULT_MAX_SIZE), |size| {
            let size = size.to_string_lossy().into_owned();
            let parsed = size.parse().ok().filter(|size| *size > 0);
            parsed
                .ok_or_else(|| ErrorOf::new(MAX_SIZE, format!("`{size}` is not a number of bytes")))
        })?;
        let path = environment.get(PATH).map(PathBuf::from);
        let path = path.unwrap_or_else(|| environment.temporary_directory().join("agent_log"));
        Ok(Self { path, max_size, level })
    }

    /// Starts logging. Must be called only once. If the file can't be opened, the log only goes to standard
    /// output, and begins with a warning.
    pub fn start(&self) -> io::Result<AgentLog> {
        let (lines, to_write) = sync_channel::<Vec<u8>>(QUEUED_LINES);
        let (written, all_written) = sync_channel(1);
        let writer = std::thread::Builder::new().name("log".into());
        writer.spawn(move || {
            for line in to_write {
                if line.is_empty() {
                    let _ = io::stdout().flush();
                    let _ = written.try_send(());
                } else {
                    // A failure of standard output can't be reported anywhere.
                    let _ = io::stdout().write_all(&line);
                }
            }
        })?;
        let file = RotatedFile::open(&self.path, self.max_size);
        let unwritable = file.as_ref().err().map(ToString::to_string);
        let path = file.is_ok().then(|| self.path.clone());
        let destinations = Destinations { stdout: lines.clone(), missed: 0, file: file.ok() };
        Builder::new()
            // Detailed messages of libraries may contain headers and variables, that is, secrets.
            .filter_level(LevelFilter::Warn.min(self.level))
            .filter_module("semaphore_agent", self.level)
            .filter_module("actors", self.level)
            .target(Target::Pipe(Box::new(destinations)))
            .format(|out, record| out.write_all(line_of(record).as_bytes()))
            .init();
        if let Some(error) = unwritable {
            log::warn!(path:% = self.path.display(), error; "the log file can't be used; logging to standard output only");
        }
        Ok(AgentLog { path, lines, all_written })
    }
}

/// The running log. On drop, waits until the queued lines are on standard output.
#[derive(Debug)]
pub struct AgentLog {
    /// Path of the log file; `None` if the file could not be opened.
    pub path: Option<PathBuf>,
    lines: SyncSender<Vec<u8>>,
    all_written: std::sync::mpsc::Receiver<()>,
}

impl Drop for AgentLog {
    fn drop(&mut self) {
        if self.lines.try_send(Vec::new()).is_ok() {
            let _ = self.all_written.recv_timeout(FLUSH_PATIENCE);
        }
    }
}

fn line_of(record: &Record<'_>) -> String {
    let now = humantime::format_rfc3339_millis(SystemTime::now().max(SystemTime::UNIX_EPOCH));
    let mut line = format!("{now} {:5} {}", record.level(), escaped(&record.args().to_string()));
    // Can't fail: formatting into a string never does.
    let _ = record.key_values().visit(&mut KeyValues(&mut line));
    line.push('\n');
    line
}

struct KeyValues<'a>(&'a mut String);

impl<'kvs> VisitSource<'kvs> for KeyValues<'_> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        let value = value.to_string();
        let plain = !value.is_empty() && !value.contains([' ', '"', '=']);
        let value = escaped(&value).replace('"', "\\\"");
        if plain {
            write!(self.0, " {key}={value}")
        } else {
            write!(self.0, " {key}=\"{value}\"")
        }?;
        Ok(())
    }
}

/// Escapes control characters and line separators.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || c == '\u{2028}' || c == '\u{2029}' {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    escaped
}

struct Destinations {
    stdout: SyncSender<Vec<u8>>,
    missed: u64,
    file: Option<RotatedFile>,
}

impl Write for Destinations {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut shown = Vec::new();
        if self.missed > 0 {
            let _ = writeln!(shown, "({} lines dropped: this output was too slow)", self.missed);
        }
        shown.extend_from_slice(line);
        match self.stdout.try_send(shown) {
            Ok(()) => self.missed = 0,
            Err(TrySendError::Full(_)) => self.missed += 1,
            Err(TrySendError::Disconnected(_)) => {}
        }
        if let Some(file) = &mut self.file {
            // A full disk must not stop the agent.
            let _ = file.write(line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A log file; when full, it is renamed to `NAME.1` and a new one is started.
struct RotatedFile {
    path: PathBuf,
    file: File,
    size: u64,
    max_size: u64,
}

impl RotatedFile {
    fn open(path: &Path, max_size: u64) -> io::Result<Self> {
        let file = open_to_append(path)?;
        let size = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, size, max_size })
    }

    /// Returns whether `path` still names the open file.
    fn is_in_place(&self) -> io::Result<bool> {
        let (open, named) = (self.file.metadata()?, self.path.symlink_metadata()?);
        Ok((open.dev(), open.ino()) == (named.dev(), named.ino()))
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if !self.is_in_place().unwrap_or(false)
            && let Ok(file) = open_to_append(&self.path)
        {
            // Another program has removed or renamed the file.
            self.size = file.metadata()?.len();
            self.file = file;
        }
        let length = line.len() as u64;
        if self.size > 0 && self.size + length > self.max_size {
            let mut old = self.path.clone().into_os_string();
            old.push(".1");
            let renamed = fs::rename(&self.path, old).and_then(|()| open_to_append(&self.path));
            match renamed {
                Ok(file) => self.file = file,
                // Losing the old lines is better than losing the new ones.
                Err(_) => self.file.set_len(0)?,
            }
            self.size = 0;
        }
        self.size += length;
        self.file.write_all(line)
    }
}

fn open_to_append(path: &Path) -> io::Result<File> {
    open(File::options().append(true).create(true).mode(0o600), path)
}

/// Opens the log file for reading.
pub fn open_to_read(path: &Path) -> io::Result<File> {
    open(File::options().read(true), path)
}

/// Opens a file, but no link, pipe or file of another user: the default directory is writable by everybody.
fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let file = options.custom_flags(O_NOFOLLOW | O_NONBLOCK).open(path)?;
    let found = file.metadata()?;
    let refused = |why| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    if !found.is_file() {
        return refused("is not a regular file");
    }
    if found.uid() != geteuid().as_raw() {
        return refused("belongs to another user");
    }
    if found.nlink() > 1 {
        return refused("has more than one hard link");
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_cannot_forge_a_line() {
        let id = "1\n2026-01-01T00:00:00Z INFO  forged";
        let values = [("job", Value::from(id)), ("empty", Value::from("")), ("n", Value::from(7))];
        let record = Record::builder()
            .level(log::Level::Warn)
            .args(format_args!("words"))
            .key_values(&values)
            .build();
        let line = line_of(&record);
        assert_eq!(line.matches('\n').count(), 1);
        let forged = r#"job="1\n2026-01-01T00:00:00Z INFO  forged""#;
        assert!(line.ends_with(&format!(" WARN  words {forged} empty=\"\" n=7\n")), "{line}");
    }

    #[test]
    fn a_file_that_cannot_be_renamed_is_truncated() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        fs::create_dir(directory.path().join("log.1")).unwrap();
        let mut file = RotatedFile::open(&path, 11).unwrap();
        for line in ["one\n", "two\n", "three\n", "four\n"] {
            file.write(line.as_bytes()).unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "three\nfour\n");
    }

    #[test]
    fn links_and_pipes_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        fs::write(path("secret"), "secret").unwrap();
        std::os::unix::fs::symlink(path("secret"), path("link")).unwrap();
        nix::unistd::mkfifo(&path("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for name in ["link", "pipe"] {
            assert!(open_to_read(&path(name)).is_err(), "{name}");
            assert!(RotatedFile::open(&path(name), 11).is_err(), "{name}");
        }
    }

    #[test]
    fn a_removed_file_is_created_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut file = RotatedFile::open(&path, 1000).unwrap();
        file.write(b"one\n").unwrap();
        fs::remove_file(&path).unwrap();
        file.write(b"two\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "two\n");
    }

    #[test]
    fn a_full_file_is_rotated_and_one_old_file_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut file = RotatedFile::open(&path, 11).unwrap();
        for line in ["one\n", "two\n", "three\n", "four\n", "a very long line\n"] {
            file.write(line.as_bytes()).unwrap();
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "a very long line\n");
        let old = directory.path().join("log.1");
        assert_eq!(fs::read_to_string(old).unwrap(), "three\nfour\n");
    }
}
