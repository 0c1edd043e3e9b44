//! The job's shell in its container: runs the job's scripts, and between them what the agent itself has to do
//! there.

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use actors::job::{EnvVar, InjectedFile};
use actors::ports::{Script, SessionEvent, ShellSession, StepError};
use bollard::errors::Error;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::engine::Engine;
use super::hijack::ContainerTerminal;
use super::pull::words_of;
use super::side_containers::PortProbe;
use crate::session::{Session, quoted};

/// How long an engine may take to say that it is there.
const PING_PATIENCE: Duration = Duration::from_secs(5);

/// Shared by what runs the job's scripts and what does the agent's own work.
pub(crate) type SharedSession = Rc<Mutex<Session<ContainerTerminal>>>;

/// Does the agent's own work in the job's shell, between its scripts.
pub(crate) struct Inside {
    pub(crate) session: SharedSession,
}

impl Inside {
    /// Answers the exit code and what was printed.
    pub(crate) async fn run(
        &mut self,
        text: &str,
        received: Option<&[u8]>,
    ) -> Result<(i32, String), StepError> {
        let mut session = self.session.lock().await;
        let script = Script { text: text.to_owned(), untraced: true };
        let typed = session.type_script(&script, received);
        typed.map_err(|error| StepError(format!("the terminal failed: {error}")))?;
        let mut printed = Vec::new();
        loop {
            match session.next_event().await {
                SessionEvent::Output(bytes) => printed.extend_from_slice(&bytes),
                SessionEvent::ScriptEnded(end) => {
                    let printed = String::from_utf8_lossy(&printed).replace("\r\n", "\n");
                    return Ok((end.exit_code, printed.trim().to_owned()));
                }
                SessionEvent::ShellEnded(_) => return Err(no_shell()),
            }
        }
    }

    /// Puts a file where it belongs, as the container's user.
    pub(crate) async fn inject(&mut self, file: &InjectedFile) -> Result<(), StepError> {
        let path = match file.path.strip_prefix("~/") {
            Some(below) => format!("\"$__agent_home\"/{}", quoted(Path::new(below))),
            None if file.path.starts_with('/') => quoted(Path::new(&file.path)),
            None => format!("\"$__agent_home\"/{}", quoted(Path::new(&file.path))),
        };
        let parent = "${__agent_path%/*}";
        let text = format!(
            "__agent_path={path}; [[ -d {parent}/ ]] || __agent_program mkdir -p -- \"{parent}\" && \
             ( builtin umask 077; __agent_receive \"$__agent_path\" )"
        );
        let (exit_code, printed) = self.run(&text, Some(&file.content)).await?;
        if exit_code != 0 {
            return Err(StepError(format!("{}: {printed}", file.path)));
        }
        let mode = quoted(Path::new(&file.mode));
        let text = format!("__agent_program chmod -- {mode} \"$__agent_path\"");
        if self.run(&text, None).await?.0 != 0 {
            // Existing clients expect just this.
            return Err(StepError(format!("Failed to set file mode to {}", file.mode)));
        }
        self.run("builtin unset __agent_path", None).await.map(drop)
    }
}

impl PortProbe for Inside {
    async fn accepts(&mut self, name: &str, ports: &[u16]) -> Result<bool, StepError> {
        let ports: Vec<_> = ports.iter().map(ToString::to_string).collect();
        let text = format!(
            "( for port in {}; do builtin : </dev/tcp/{name}/$port && builtin exit; done; builtin exit 1 ) 2>/dev/null",
            ports.join(" ")
        );
        self.run(&text, None).await.map(|(exit_code, _)| exit_code == 0)
    }
}

/// Sets and exports each, not by a plain `export`, which `set -k` changes; the values are the shell's `$'…'`, as
/// they may be any bytes.
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
    StepError("the job's shell has ended, so this can't run".into())
}

/// Has login shells of the container's user source `path`, as long as it is there.
pub(crate) fn show_to_logins(path: &str) -> String {
    format!(
        r#" && {{
[[ -e "$__agent_home/.bash_profile" ]] || builtin printf '%s\n' 'if [ -r ~/.bash_login ]; then . ~/.bash_login; elif [ -r ~/.profile ]; then . ~/.profile; fi' >|"$__agent_home/.bash_profile"
builtin printf '%s\n' "[ ! -r '{path}' ] || . '{path}'" >>"$__agent_home/.bash_profile"
true
}} 2>/dev/null"#
    )
}

/// The session of a job in a container: its scripts are typed.
pub(crate) struct DockerSession {
    session: SharedSession,
    engine: Engine,
    end_told: bool,
}

impl DockerSession {
    /// A session on a terminal of `engine`.
    pub(crate) fn new(session: SharedSession, engine: Engine) -> Self {
        Self { session, engine, end_told: false }
    }
}

impl ShellSession for DockerSession {
    fn start<'a>(&'a mut self, script: &'a Script) -> LocalBoxFuture<'a, std::io::Result<()>> {
        async { self.session.lock().await.type_script(script, None) }.boxed_local()
    }

    fn next_event(&mut self) -> LocalBoxFuture<'_, SessionEvent> {
        async {
            let event = self.session.lock().await.next_event().await;
            if !matches!(event, SessionEvent::ShellEnded(_)) || self.end_told {
                return event;
            }
            // The stream ends with the shell, and with the engine.
            let pinged = timeout(PING_PATIENCE, self.engine.api.ping()).await;
            self.end_told = true;
            match pinged.unwrap_or(Err(Error::RequestTimeoutError)) {
                Ok(_) => event,
                Err(error) => {
                    let line = format!("The Docker Engine is gone: {}\r\n", words_of(&error));
                    SessionEvent::Output(line.into())
                }
            }
        }
        .boxed_local()
    }
}
