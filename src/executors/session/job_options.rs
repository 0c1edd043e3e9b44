//! Options of the job's shell that the session has to turn off for itself.

/// Options that the session turns off between scripts and on again for the next one: they would show, change or
/// skip what the agent types.
#[derive(Debug, Default)]
pub(super) struct JobOptions {
    pub(super) aliases: bool,
    /// `set -v`, `-x`, `-E`, `-T`.
    pub(super) set: String,
    /// Line editors, the debugger and the history, by the signs of the frame.
    pub(super) other: String,
}

impl JobOptions {
    pub(super) fn of(flags: &str) -> Self {
        Self {
            aliases: flags.contains('@'),
            set: flags.matches(['v', 'x', 'E', 'T']).collect(),
            other: flags.matches(['+', '=', '%', '~']).collect(),
        }
    }
}
