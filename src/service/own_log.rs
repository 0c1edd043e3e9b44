//! The agent's own log: to standard output and to a file that is rotated at a size.
//!
//! One line an entry: time, level, constant words, then key-values. Values are escaped, so that none
//! can pass for another line. Never a secret, a token, or a variable's value.

use actors::errors::ErrorOf;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::{Duration, SystemTime};

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

/// How many lines standard output may lag behind before it misses some: whoever reads it slowly,
/// or not at all, must not hold up the agent.
const LINES_AHEAD: usize = 4096;

/// How long the last lines may take to standard output.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Where the log goes and how much of it.
#[derive(Clone, Debug)]
pub struct AgentLogConfig {
    /// The file.
    pub path: PathBuf,
    /// The size at which it is rotated, in bytes.
    pub max_size: u64,
    level: LevelFilter,
}

impl AgentLogConfig {
    /// What the environment says; otherwise `agent_log` in the directory for temporary files, and
    /// everything from information on.
    pub fn from_env(environment: &Environment) -> Result<Self, ErrorOf> {
        let level = environment.get(LEVEL).map_or(Ok(LevelFilter::Info), |level| {
            let level = level.to_string_lossy().into_owned();
            let known = "error, warn, info, debug, trace, off";
            level.parse().map_err(|_| ErrorOf::new(LEVEL, format!("`{level}` is none of: {known}")))
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

    /// Starts logging; called once. A file that can't be written is a warning in the log.
    pub fn start(&self) -> io::Result<AgentLog> {
        let (lines, to_write) = sync_channel::<Vec<u8>>(LINES_AHEAD);
        let (written, all_written) = sync_channel(1);
        let writer = std::thread::Builder::new().name("log".into());
        writer.spawn(move || {
            for line in to_write {
                if line.is_empty() {
                    let _ = io::stdout().flush();
                    let _ = written.try_send(());
                } else {
                    // Nobody can be told that nobody listens.
                    let _ = io::stdout().write_all(&line);
                }
            }
        })?;
        let file = RotatedFile::open(&self.path, self.max_size);
        let unwritable = file.as_ref().err().map(ToString::to_string);
        let path = file.is_ok().then(|| self.path.clone());
        let destinations = Destinations { stdout: lines.clone(), missed: 0, file: file.ok() };
        Builder::new()
            // What libraries have to say in detail may hold headers and variables.
            .filter_level(LevelFilter::Warn.min(self.level))
            .filter_module("semaphore_agent", self.level)
            .filter_module("actors", self.level)
            .target(Target::Pipe(Box::new(destinations)))
            .format(|out, record| out.write_all(line_of(record).as_bytes()))
            .init();
        if let Some(error) = unwritable {
            log::warn!(path:% = self.path.display(), error; "the agent's log goes to standard output only");
        }
        Ok(AgentLog { path, lines, all_written })
    }
}

/// Waits for standard output when it goes.
#[derive(Debug)]
pub struct AgentLog {
    /// The file that is written, if one is.
    pub path: Option<PathBuf>,
    lines: SyncSender<Vec<u8>>,
    all_written: std::sync::mpsc::Receiver<()>,
}

impl Drop for AgentLog {
    fn drop(&mut self) {
        if self.lines.try_send(Vec::new()).is_ok() {
            let _ = self.all_written.recv_timeout(LAST_LINES);
        }
    }
}

fn line_of(record: &Record<'_>) -> String {
    let now = humantime::format_rfc3339_millis(SystemTime::now().max(SystemTime::UNIX_EPOCH));
    let mut line = format!("{now} {:5} {}", record.level(), escaped(&record.args().to_string()));
    // Fails only if writing to a string did.
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

/// Control characters, line ends among them, as escapes.
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
            let _ = writeln!(shown, "({} lines were too many for this output)", self.missed);
        }
        shown.extend_from_slice(line);
        match self.stdout.try_send(shown) {
            Ok(()) => self.missed = 0,
            Err(TrySendError::Full(_)) => self.missed += 1,
            Err(TrySendError::Disconnected(_)) => {}
        }
        if let Some(file) = &mut self.file {
            // A full disk must not hold up the agent.
            let _ = file.write(line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file that is renamed to `NAME.1` when it is full, and begun anew.
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

    /// Whether the file that is written is still the one of its name.
    fn is_at_its_place(&self) -> io::Result<bool> {
        let (open, named) = (self.file.metadata()?, self.path.symlink_metadata()?);
        Ok((open.dev(), open.ino()) == (named.dev(), named.ino()))
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if !self.is_at_its_place().unwrap_or(false)
            && let Ok(file) = open_to_append(&self.path)
        {
            // Somebody has removed it, or put it elsewhere.
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
                // Rather without the old lines than without the new ones.
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

/// Opens the log for a reader.
pub fn open_to_read(path: &Path) -> io::Result<File> {
    open(File::options().read(true), path)
}

/// The default place is a directory where others can put links and pipes.
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
        return refused("has another name as well");
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_can_not_pass_for_another_line() {
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
    fn a_file_that_can_not_be_renamed_goes_on_without_its_old_lines() {
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
    fn what_others_put_in_its_place_is_not_read() {
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
    fn a_file_that_is_removed_comes_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut file = RotatedFile::open(&path, 1000).unwrap();
        file.write(b"one\n").unwrap();
        fs::remove_file(&path).unwrap();
        file.write(b"two\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "two\n");
    }

    #[test]
    fn a_full_file_is_begun_anew_and_one_old_one_kept() {
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
