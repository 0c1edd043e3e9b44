//! The script that defines the session's functions in a fresh shell.

use std::io;
use std::path::Path;

use super::typed::{self, Typed, parts_of};
use super::{Session, Terminal};
use crate::os::shell_words::quoted;

/// The functions that the session defines in every shell.
const FUNCTIONS: &str = "__agent_ok __agent_prompt __agent_ready __agent_begin __agent_end";

/// Turns POSIX mode on again if the probe has turned it off.
const RESTORE: &str = "[[ :$__agent_options: != *:posix:* ]] || builtin set -o posix\n";

/// Returns `script` without comments: with `interactive_comments` off, bash would run them.
fn without_comments(script: &str) -> String {
    let lines = script.lines().filter(|line| !line.trim_start().starts_with('#'));
    lines.map(|line| format!("{}\n", line.trim_start())).collect()
}

impl<T: Terminal> Session<T> {
    /// Returns the script that the shell must run before all others.
    pub fn bootstrap(&self) -> String {
        let functions = self.functions(include_str!("mark.bash"), include_str!("tell.bash"));
        format!("{functions}{RESTORE}builtin readonly -f {FUNCTIONS}\n")
    }

    /// Returns the session's functions. `mark` is the code that asks for a script's mark and reads it, `tell`
    /// the code that prints the last frame.
    fn functions(&self, mark: &str, tell: &str) -> String {
        without_comments(include_str!("bootstrap.bash"))
            .replace("@MARK@\n", &without_comments(mark))
            .replace("@TELL@\n", &without_comments(tell))
            .replace("@TAIL@", &quoted(typed::TAIL))
            .replace("@PROMPT@", self.frames.prompt.as_str())
    }

    /// Makes bash source the bootstrap script at `path` once bash is ready. The end of the bootstrap is an
    /// event like that of any script.
    pub fn start_bootstrap(&mut self, path: &Path) -> io::Result<()> {
        self.start_when_ready(&format!("\\builtin . {}", quoted(path)))
    }

    /// Types the bootstrap script, for a shell that can't read this machine's files. The shell will keep each
    /// script in `file`; the bootstrap's exit code is 0 if it can write to it.
    ///
    /// May be called before the shell is started.
    pub fn type_bootstrap(&mut self, file: &str) -> io::Result<()> {
        self.typed = Typed::new(file);
        self.frames.after_mark = typed::after_mark();
        let typed = without_comments(include_str!("typed.bash"))
            .replace("@TAKE@", self.frames.take.as_str())
            .replace("@FILE@", file);
        let script = format!(
            "{}{typed}{RESTORE}builtin readonly -f {FUNCTIONS} __agent_receive __agent_unwritten __agent_program\n\
             [[ -w '{file}' ]]\n",
            self.functions(include_str!("typed_mark.bash"), include_str!("typed_tell.bash")),
        );
        let parts = parts_of(script.as_bytes());
        let lines: String = parts.iter().map(|part| format!(" __agent_boot+='{part}'\n")).collect();
        let eval = "\\builtin printf -v __agent_boot %b \"$__agent_boot\"; \\builtin eval \"$__agent_boot\"";
        self.start_when_ready(&format!("__agent_boot=\n{lines} {eval}"))
    }
}

/// Returns the line that asks whether the shell is ready; `number` counts the tries from 0.
///
/// A startup file may read the beginning of the line away. So the line contains no quotes, as the rest must not open
/// one, and the rest must not begin with the name of a program: after `__agent_tail=` is read away, the names of
/// shell options end in `_`.
pub(super) fn probe(ready: &str, number: u32) -> String {
    // In POSIX mode special builtins are found before functions, so `unset` works even if a startup file has
    // defined a function of that name. The assignment fails if POSIXLY_CORRECT is readonly (POSIX mode is on
    // then), so every second try goes without it.
    let (posix, no_posix) = if number.is_multiple_of(2) {
        ("POSIXLY_CORRECT=y; ", " +o posix${__agent_tail-_}")
    } else {
        ("", "")
    };
    format!(
        " __agent_options=${{__agent_options-$-:$SHELLOPTS:$BASHOPTS}}; {posix}\\unset -f builtin; \
         __agent_tail=; \\set +o emacs${{__agent_tail-_}} +o vi${{__agent_tail-_}}{no_posix}; \
         \\builtin unset -v __agent_tail; \\builtin shopt -u expand_aliases; \
         \\builtin printf \\\\001%s\\\\001 {ready} >/dev/tty\n"
    )
}

#[cfg(test)]
mod tests {
    use std::fs::{File, Permissions};
    use std::io::{Seek as _, Write as _};
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;
    use std::process::Command;

    use super::*;

    fn file_of(text: &str) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.rewind().unwrap();
        file
    }

    /// Makes a directory with programs named like words of the probe; each leaves a file there when it runs.
    fn programs() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for name in ["vi", "emacs", "posix"] {
            let path = directory.path().join(name);
            std::fs::write(&path, "#!/bin/sh\n: >\"$0.ran\"\n").unwrap();
            std::fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
        }
        directory
    }

    fn ran_any(programs: &Path) -> bool {
        let paths = std::fs::read_dir(programs).unwrap().map(|entry| entry.unwrap().path());
        paths.into_iter().any(|path| path.extension().is_some_and(|extension| extension == "ran"))
    }

    #[test]
    fn a_probe_that_was_cut_anywhere_does_not_disturb_the_next_one() {
        let programs = programs();
        for number in 0..2 {
            let line = probe("READY", number).replace("/dev/tty", "/dev/stdout");
            for cut in 0..line.len() {
                // Interactive, so that it goes on after an error like a login shell on a terminal.
                let mut shell = Command::new("/bin/bash");
                shell.args(["--norc", "--noprofile", "-i"]).env("HISTFILE", "");
                shell.env("PATH", programs.path()).current_dir(programs.path());
                let stdin = file_of(&format!("{}{line}", &line[cut..]));
                let ran = shell.stdin(stdin).output().unwrap();
                assert!(ran.stdout.ends_with(b"\x01READY\x01"), "{cut}: {ran:?}");
                let rest = &line[cut..];
                assert!(!ran_any(programs.path()), "{cut}: {rest}");
            }
        }
    }
}
