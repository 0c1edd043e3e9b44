//! The files of SSH access to a job: authorized keys, the script that enters the job, and a line in the
//! login profile that loads the job's environment.
//!
//! Each line added to a file of the user is marked with the job directory, so that exactly the added
//! lines are removed again: at the job's teardown, by the job's guard if the agent is killed, or at the
//! agent's next start if both are. No symbolic link is followed.

mod logins;
mod user_file;

use std::fs::{DirBuilder, File, Permissions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use actors::ports::SshAccessFiles;
use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use serde::{Deserialize, Serialize};

use self::logins::Logins;
use self::user_file::{MARK, UserFile, is_not_ours, split};
use crate::os::shell_words::quoted;
use crate::state;

/// Path at which people and tools expect the script (docs/protocol.md: "SSH access").
pub const DEFAULT_SCRIPT: &str = "/tmp/ssh_jump_point";

/// Content of the script while no job can be entered.
const NO_JOB: &str = "#!/usr/bin/env bash\necho 'No job runs here now.' >&2\nexit 1\n";

/// Environment variable of all processes in an SSH session; its value is the job directory.
const SESSION_VARIABLE: &str = "SEMAPHORE_AGENT_SSH_SESSION";

/// Attempts to get the lock on the home directory before going on without it. Agents hold the lock only
/// briefly; another program that holds it must not prevent a job's keys from being removed.
const LOCK_TRIES: u32 = 100;
/// Pause between two attempts to get the lock.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Maximum number of sweeps that kill session processes: a process may fork just before it is killed.
const SESSION_SWEEPS: u32 = 100;

/// SSH access to one job.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct SshAccess {
    /// The home directory of the user who runs the agent.
    pub home: PathBuf,
    /// Path of the script.
    pub script: PathBuf,
    /// The job directory: absolute, and unique to the job.
    pub job_directory: PathBuf,
    /// Install the script even if the job has no keys.
    pub without_keys: bool,
    /// The shell or container that the script enters.
    pub leads_to: LeadsTo,
}

/// Target of the SSH access script.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub enum LeadsTo {
    /// A shell of this machine.
    Shell {
        /// Path of the script with the job's environment, which exists once the job has exported it.
        /// `None` if logins must not see the environment.
        environment: Option<PathBuf>,
    },
    /// The main container. The login profile in the container loads the job's environment.
    Container {
        /// The container's name.
        name: String,
        /// Environment variables with which `docker` finds the engine.
        engine: Vec<(String, String)>,
    },
}

/// The part of the script that waits until `$container` runs, and then enters it.
const INTO_CONTAINER: &str = r#"
command -v docker >/dev/null || { echo 'Cannot enter the container: the `docker` command is not installed on this machine.' >&2; exit 127; }
waited=
while :; do
  state=$(docker inspect -f '{{.State.Status}}' "$container" 2>&1 | tail -n 1)
  case $state in
    running) break ;;
    created|restarting|*[Nn]'o such object'*) ;;
    exited|dead|removing|paused) echo "The job's container is gone ($state)." >&2; exit 1 ;;
    *) printf '%s\n' "$state" >&2; exit 1 ;;
  esac
  [ -e "$job" ] || { echo 'The job is over.' >&2; exit 1; }
  [ -n "$waited" ] || printf "Waiting for the job's container " >&2
  waited=1
  printf . >&2
  sleep 0.5
done
[ -z "$waited" ] || echo >&2
if [ $# -eq 0 ]; then
  set -- bash --login
fi
if [ -t 0 ] && [ -t 1 ]; then
  exec docker exec -it "$container" "$@"
fi
exec docker exec -i "$container" "$@"
"#;

/// Reserves the script's path for this agent; on drop, removes the script unless it belongs to a job.
#[derive(Debug)]
pub struct ClaimedScript(PathBuf);

impl Drop for ClaimedScript {
    fn drop(&mut self) {
        let removed = split(&self.0).and_then(|(directory, name)| {
            UserFile::at(directory, name)?.remove_if(|content| content == NO_JOB.as_bytes())
        });
        if let Err(error) = removed {
            log::warn!(path:% = self.0.display(), error:%; "the script for SSH access can't be removed");
        }
    }
}

impl SshAccess {
    /// Removes the SSH access of jobs whose agent and guard both died. Then puts a placeholder at the
    /// script's path, so that no other user can put a script of theirs there.
    pub fn claim(home: &Path, script: &Path) -> io::Result<ClaimedScript> {
        remove_marked(home, script, &|job_directory| !job_directory.exists())?;
        let (directory, name) = split(script)?;
        let path = UserFile::at(directory, name)?;
        if !path.is_ours()? {
            path.replace(NO_JOB.as_bytes(), 0o600)?;
        }
        Ok(ClaimedScript(script.to_owned()))
    }

    /// The script that each login sources.
    fn session_file(&self) -> PathBuf {
        self.job_directory.join("ssh-session")
    }

    /// The list of logins; exists once somebody has logged in.
    fn used_file(&self) -> PathBuf {
        self.job_directory.join("ssh-used")
    }

    fn add_keys(&self, keys: &[Bytes]) -> io::Result<()> {
        let lines: Vec<&[u8]> = keys
            .iter()
            .flat_map(|key| key.split(|byte| matches!(byte, b'\n' | b'\r')))
            .filter(|line| !line.trim_ascii().is_empty())
            .collect();
        if lines.is_empty() {
            return Ok(());
        }
        let ssh = self.home.join(".ssh");
        match DirBuilder::new().mode(0o700).create(&ssh) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let keys = UserFile::for_keys(&self.home)?;
        keys.directory.set_permissions(Permissions::from_mode(0o700))?;
        keys.add(&lines, " ", &self.job_directory, 0o600)
    }

    /// Installs the session file and the line in the login profile that sources it.
    ///
    /// Logins are recorded only if the job has keys: without them, people log in with keys of their own,
    /// and their sessions must not end with the job.
    fn show_environment(&self, with_keys: bool) -> io::Result<()> {
        let record_login = if with_keys {
            format!(
                "[ -z \"${{SSH_CONNECTION-}}\" ] || {{ export {SESSION_VARIABLE}={job}; \
                 read -r -d '' {SESSION_VARIABLE}_STAT < /proc/$$/stat || :; \
                 {SESSION_VARIABLE}_STAT=(${{{SESSION_VARIABLE}_STAT##*) }}); \
                 printf '%s %s %s\\n' $$ \"${{{SESSION_VARIABLE}_STAT[19]}}\" \"$SSH_CONNECTION\" >> {used}; \
                 unset {SESSION_VARIABLE}_STAT; }}\n",
                job = quoted(&self.job_directory),
                used = quoted(self.used_file()),
            )
        } else {
            String::new()
        };
        let environment = self.environment();
        let load_environment = environment.map_or_else(String::new, |environment| {
            let environment = quoted(environment);
            format!("[ ! -r {environment} ] || . {environment}\n")
        });
        let session = record_login + &load_environment;
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        options.open(self.session_file())?.write_all(session.as_bytes())?;
        if environment.is_none() {
            return Ok(());
        }
        let profile = UserFile::at(&self.home, ".bash_profile")?;
        // Once `~/.bash_profile` exists, a login shell no longer reads these two files.
        let others = "if [ -r ~/.bash_login ]; then . ~/.bash_login; \
                      elif [ -r ~/.profile ]; then . ~/.profile; fi";
        let ours = format!("[ ! -r {0} ] || . {0}", quoted(self.session_file()));
        let lines = [others.as_bytes(), ours.as_bytes()];
        let lines = if profile.exists()? { &lines[1..] } else { &lines[..] };
        profile.add(lines, " # ", &self.job_directory, 0o644)
    }

    fn write_script(&self) -> io::Result<()> {
        let leads_to = match &self.leads_to {
            LeadsTo::Shell { .. } => {
                "if [ $# -eq 0 ]; then\n  exec bash --login\nfi\nexec \"$@\"\n".to_owned()
            }
            LeadsTo::Container { name, engine } => {
                let engine: String = engine
                    .iter()
                    .map(|(name, value)| format!("export {name}={}\n", quoted(value)))
                    .collect();
                let name = quoted(name);
                // The scratch directory is deleted with the job's containers, the job directory only later.
                let job = quoted(state::job_dir::scratch_of(&self.job_directory));
                format!("{engine}container={name}\njob={job}{INTO_CONTAINER}")
            }
        };
        let script = format!(
            "#!/usr/bin/env bash\n# {MARK}{job}\n\
             [ ! -r {session} ] || . {session}\n{leads_to}",
            job = self.job_directory.display(),
            session = quoted(self.session_file()),
        );
        let (directory, name) = split(&self.script)?;
        UserFile::at(directory, name)?.replace(script.as_bytes(), 0o600)
    }

    fn environment(&self) -> Option<&Path> {
        match &self.leads_to {
            LeadsTo::Shell { environment } => environment.as_deref(),
            LeadsTo::Container { .. } => None,
        }
    }

    /// Kills the processes of all SSH sessions of the job.
    fn end_sessions(&self) -> io::Result<()> {
        let logins = Logins::read(self)?;
        for _ in 0..SESSION_SWEEPS {
            if logins.kill()? == 0 {
                break;
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    fn open_now(&self, keys: &[Bytes]) -> io::Result<()> {
        if keys.is_empty() && !self.without_keys {
            return Ok(());
        }
        let _home_lock = lock(&self.home)?;
        // The script comes before the keys: a login with a key of the job must not run another user's script.
        self.write_script().map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", self.script.display()))
        })?;
        // Do both, even if one of them fails.
        let added = [
            ("the keys", self.add_keys(keys)),
            ("the login profile", self.show_environment(!keys.is_empty())),
        ];
        first_error(added)
    }

    /// Does the same as [`SshAccessFiles::close`] for a guard whose agent is dead, and removes the script.
    pub fn close_for_good(&self) -> io::Result<()> {
        let claimed = ClaimedScript(self.script.clone());
        let closed = self.close_now();
        drop(claimed);
        closed
    }

    fn close_now(&self) -> io::Result<()> {
        let removed =
            remove_marked(&self.home, &self.script, &|job| job == self.job_directory.as_path());
        first_error([("the files", removed), ("sessions", self.end_sessions())])
    }
}

impl SshAccessFiles for SshAccess {
    fn open(&self, keys: Vec<Bytes>) -> LocalBoxFuture<'static, io::Result<()>> {
        let access = self.clone();
        on_a_thread(move || access.open_now(&keys))
    }

    fn close(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        let access = self.clone();
        on_a_thread(move || access.close_now())
    }

    fn close_if_unused(&self) -> LocalBoxFuture<'static, io::Result<bool>> {
        let access = self.clone();
        on_a_thread(move || {
            if Logins::read(&access)?.is_anybody_there()? {
                return Ok(false);
            }
            access.close_now().map(|()| true)
        })
    }
}

/// Runs `work` on a thread: the home directory may be on a slow network, or locked by another program.
fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> LocalBoxFuture<'static, io::Result<T>> {
    let done = actix_rt::task::spawn_blocking(work);
    async { done.await.map_err(io::Error::other)? }.boxed_local()
}

fn first_error<const N: usize>(results: [(&str, io::Result<()>); N]) -> io::Result<()> {
    for (what, result) in results {
        result.map_err(|error| io::Error::new(error.kind(), format!("{what}: {error}")))?;
    }
    Ok(())
}

/// Locks the home directory against other agents of the same user, which change the same files.
fn lock(home: &Path) -> io::Result<File> {
    let directory = File::open(home)?;
    for _ in 0..LOCK_TRIES {
        match directory.try_lock() {
            Ok(()) => return Ok(directory),
            Err(TryLockError::WouldBlock) => pause(),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    log::warn!(home:?; "another program holds a lock on the home directory; continuing without the lock");
    Ok(directory)
}

#[expect(clippy::disallowed_methods, reason = "on a thread that has nothing else to do")]
fn pause() {
    std::thread::sleep(LOCK_PAUSE);
}

/// Removes all lines of the jobs for which `gone` returns `true`, and the script if it belongs to one of
/// them.
fn remove_marked(home: &Path, script: &Path, gone: &dyn Fn(&Path) -> bool) -> io::Result<()> {
    let _home_lock = lock(home)?;
    let keys = match UserFile::for_keys(home) {
        Err(error) if is_not_ours(&error) => Ok(()),
        keys => keys.and_then(|keys| keys.remove(gone)),
    };
    let profile = UserFile::at(home, ".bash_profile").and_then(|profile| profile.remove(gone));
    let (directory, name) = split(script)?;
    let script = UserFile::at(directory, name)
        .and_then(|script| script.replace_if_marked(gone, NO_JOB.as_bytes()));
    first_error([("the keys", keys), ("the login profile", profile), ("the script", script)])
}

#[cfg(test)]
mod tests;
