//! Options of the job's shell that the session turns off between scripts.

/// The options that were on when the last script ended.
///
/// The session turns them off between scripts, because they would show, change or skip what the agent types,
/// and on again for the next script.
#[derive(Debug, Default)]
pub(super) struct JobOptions {
    pub(super) aliases: bool,
    /// The letters of `set -v`, `-x`, `-E` and `-T`.
    pub(super) set: String,
    /// The signs that `__agent_end` adds to the flags: `+` for `vi`, `=` for `emacs`, `~` for `history`, `%`
    /// for `extdebug`.
    pub(super) other: String,
}

impl JobOptions {
    /// Parses the flags of the frame that ends a script.
    pub(super) fn from_flags(flags: &str) -> Self {
        Self {
            aliases: flags.contains('@'),
            set: flags.matches(['v', 'x', 'E', 'T']).collect(),
            other: flags.matches(['+', '=', '%', '~']).collect(),
        }
    }
}
