//! The job's shell in its container: runs the job's scripts and, between them, the agent's own commands.

use std::rc::Rc;
use std::time::Duration;

use actors::job::{EnvVar, InjectedFile};
use actors::ports::{Script, SessionEvent, ShellSession, StepError};
use bollard::errors::Error;
use bollard::query_parameters::InspectContainerOptions;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};

use super::engine::Engine;
use super::errors::RequestError;
use super::hijack::ContainerTerminal;
use super::side_containers::PortProbe;
use crate::executors::session::Session;
use crate::os::shell_words::quoted;

/// How many of the last bytes that one of the agent's own commands prints are kept.
const MOST_KEPT: usize = 64 << 10;

/// How long the engine may take to inspect a container.
const INSPECT_PATIENCE: Duration = Duration::from_secs(5);

/// The exit code of a container that was killed.
const KILLED: i64 = 137;

/// How long to wait for the engine to report that a killed container ran out of memory.
const KILLED_PATIENCE: Duration = Duration::from_millis(500);

/// How long a container may take to end after its terminal has ended, and the pause between two checks.
const END_PATIENCE: Duration = Duration::from_secs(2);
const CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// The session, shared by [`DockerSession`] and [`AgentCommands`].
pub(crate) type SharedSession = Rc<Mutex<Session<ContainerTerminal>>>;

/// Runs the agent's own commands in the job's shell, between the job's scripts.
pub(crate) struct AgentCommands {
    pub(crate) session: SharedSession,
}

impl AgentCommands {
    /// Runs `text`, and returns its exit code and output. `received` is what a `__agent_receive` in `text`
    /// writes to its file.
    pub(crate) async fn run(
        &mut self,
        text: &str,
        received: Option<&[u8]>,
    ) -> Result<(i32, String), StepError> {
        let mut session = self.session.lock().await;
        if session.is_broken() {
            return Err(no_shell());
        }
        let script = Script { text: text.to_owned(), untraced: true };
        let typed = session.type_script(&script, received);
        typed.map_err(|error| StepError::of("the terminal failed", error))?;
        let mut printed = Vec::new();
        loop {
            match session.next_event().await {
                SessionEvent::Output(bytes) => {
                    printed.extend_from_slice(&bytes);
                    printed.drain(..printed.len().saturating_sub(MOST_KEPT));
                }
                SessionEvent::ScriptEnded(end) => {
                    let printed = String::from_utf8_lossy(&printed).replace("\r\n", "\n");
                    return Ok((end.exit_code, printed.trim().to_owned()));
                }
                SessionEvent::ShellEnded(_) => return Err(no_shell()),
            }
        }
    }

    /// Writes `file` as the container's user, and creates missing parent directories.
    pub(crate) async fn inject(&mut self, file: &InjectedFile) -> Result<(), StepError> {
        let path = match file.path.strip_prefix("~/") {
            Some(below) => format!("\"$__agent_home\"/{}", quoted(below)),
            None if file.path.starts_with('/') => quoted(&file.path),
            None => format!("\"$__agent_home\"/{}", quoted(&file.path)),
        };
        let parent = "${__agent_path%/*}";
        let text = format!(
            "__agent_path={path}; [[ -d {parent}/ ]] || __agent_program mkdir -p -- \"{parent}\" && \
             ( builtin umask 077; __agent_receive \"$__agent_path\" )"
        );
        let (exit_code, printed) = self.run(&text, Some(&file.content)).await?;
        if exit_code != 0 {
            return Err(StepError::of(&file.path, printed));
        }
        let mode = quoted(&file.mode);
        let text = format!("__agent_program chmod -- {mode} \"$__agent_path\"");
        if self.run(&text, None).await?.0 != 0 {
            // Existing clients expect exactly this text, without chmod's message.
            return Err(StepError::new(format!("Failed to set file mode to {}", file.mode)));
        }
        self.run("builtin unset __agent_path", None).await.map(drop)
    }
}

impl PortProbe for AgentCommands {
    async fn accepts(&mut self, name: &str, ports: &[u16]) -> Result<bool, StepError> {
        let ports: Vec<_> = ports.iter().map(ToString::to_string).collect();
        let text = format!(
            "( for port in {}; do builtin : </dev/tcp/{name}/$port && builtin exit; done; builtin exit 1 ) 2>/dev/null",
            ports.join(" ")
        );
        self.run(&text, None).await.map(|(exit_code, _)| exit_code == 0)
    }
}

/// Returns a script that sets and exports `variables`. `printf -v` sets them, as `export NAME=VALUE` means
/// something else under `set -k`. The values are quoted as `$'…'`, as they may contain any bytes.
pub(crate) fn export_lines(variables: &[EnvVar]) -> String {
    use std::fmt::Write as _;

    let mut script = String::new();
    for EnvVar { name, value } in variables {
        // Writing to a string never fails.
        let _ = write!(script, "builtin printf -v {} %s $'", name.as_str());
        for byte in value {
            match byte {
                b' '..=b'~' if !matches!(byte, b'\'' | b'\\') => script.push(char::from(*byte)),
                _ => drop(write!(script, "\\{byte:03o}")),
            }
        }
        let _ = writeln!(script, "' && builtin export {} || builtin return 1", name.as_str());
    }
    script
}

pub(crate) fn no_shell() -> StepError {
    StepError::new("the job's shell has ended, so this can't run")
}

/// Returns shell code, to be appended to a command, that makes login shells of the container's user source
/// `path` while that file exists.
pub(crate) fn show_to_logins(path: &str) -> String {
    format!(
        r#" && {{
[[ -e "$__agent_home/.bash_profile" ]] || builtin printf '%s\n' 'if [ -r ~/.bash_login ]; then . ~/.bash_login; elif [ -r ~/.profile ]; then . ~/.profile; fi' >|"$__agent_home/.bash_profile"
builtin printf '%s\n' "[ ! -r '{path}' ] || . '{path}'" >>"$__agent_home/.bash_profile"
true
}} 2>/dev/null"#
    )
}

/// The session of a job in a container. Scripts are typed, as the shell can't read files of this machine.
pub(crate) struct DockerSession {
    session: SharedSession,
    engine: Engine,
    /// The id of the main container.
    main: String,
}

impl DockerSession {
    /// Returns a session on the terminal of the container `main` of `engine`.
    pub(crate) fn new(session: SharedSession, engine: Engine, main: String) -> Self {
        Self { session, engine, main }
    }

    /// Finds out why the terminal's stream has ended: because of the shell, its container, or the engine.
    async fn why_it_ended(&self) -> String {
        let give_up = Instant::now() + END_PATIENCE;
        let reason_due = Instant::now() + KILLED_PATIENCE;
        loop {
            let found = timeout(
                INSPECT_PATIENCE,
                self.engine.api.inspect_container(&self.main, None::<InspectContainerOptions>),
            );
            let state = match found.await.unwrap_or(Err(Error::RequestTimeoutError)) {
                Ok(found) => found.state.unwrap_or_default(),
                Err(Error::DockerResponseServerError { status_code: 404, .. }) => {
                    return "its container was removed".into();
                }
                Err(error) => {
                    return format!("the Docker Engine is gone: {}", RequestError::from(error));
                }
            };
            let code = state.exit_code.unwrap_or_default();
            if state.oom_killed == Some(true) {
                return "its container ran out of memory".into();
            }
            if state.running != Some(true) {
                match code {
                    // The engine may report the lack of memory only some time after the end.
                    KILLED if Instant::now() < reason_due => {}
                    KILLED => {
                        return "its container or the shell in it was killed, exit code 137".into();
                    }
                    code => return format!("exit code {code}"),
                }
            } else if Instant::now() >= give_up {
                return "the connection to its terminal was cut".into();
            }
            sleep(CHECK_INTERVAL).await;
        }
    }
}

impl ShellSession for DockerSession {
    fn start<'a>(&'a mut self, script: &'a Script) -> LocalBoxFuture<'a, std::io::Result<()>> {
        async { self.session.lock().await.type_script(script, None) }.boxed_local()
    }

    fn next_event(&mut self) -> LocalBoxFuture<'_, SessionEvent> {
        async {
            let mut session = self.session.lock().await;
            let event = session.next_event().await;
            match event {
                SessionEvent::ShellEnded(how) if how.is_empty() && !session.is_broken() => {
                    SessionEvent::ShellEnded(self.why_it_ended().await)
                }
                event => event,
            }
        }
        .boxed_local()
    }
}
