//! Scripts for a shell that can't read this machine's files. They are typed on its terminal, in parts.
//!
//! A terminal accepts lines of at most 4095 bytes and interprets control characters, so a script is sent as
//! printable text that `printf %b` turns back into its bytes. A short script is an argument of the typed line
//! itself. A long one follows in parts; the shell asks for each with the frame TAKE, after it has turned the
//! terminal's echo off. Data that a script receives while it runs (`__agent_receive`) is sent the same way.

use std::collections::VecDeque;
use std::fmt::Write as _;

use super::Mark;

/// The length of a part, in bytes, from which on the next one begins. With the rest of its line, it stays
/// below a terminal's limit of 4095.
const LONGEST_PART: usize = 3500;

/// The parts of the current script that are still to be typed.
#[derive(Debug, Default)]
pub(super) struct Typed {
    /// The file in the container where the shell keeps the script; empty if scripts are not typed.
    file: String,
    /// The parts that the shell will ask for; an empty part ends the file that is received.
    parts: VecDeque<String>,
}

/// All printable characters, typed behind a script's mark: they arrive unchanged only if no special character
/// of the terminal is among them.
pub(super) const TAIL: &str = "!\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~";

/// Returns what follows a typed mark, and may be echoed. `?` stands for the letter of the question.
pub(super) fn after_mark() -> Vec<u8> {
    format!("?{TAIL}..").into_bytes()
}

impl Typed {
    pub(super) fn new(file: &str) -> Self {
        Self { file: file.to_owned(), ..Self::default() }
    }

    pub(super) fn file(&self) -> &str {
        &self.file
    }

    pub(super) fn is_used(&self) -> bool {
        !self.file.is_empty()
    }

    /// Begins a script. Returns it as the argument for the typed line if it is short enough; else the shell
    /// must ask for its parts. `received` is the data that the script will ask for while it runs.
    pub(super) fn begin(&mut self, script: &[u8], received: Option<&[u8]>) -> Option<String> {
        let mut parts = parts_of(script);
        let in_line = if parts.len() == 1 { parts.pop() } else { None };
        self.parts.clear();
        if in_line.is_none() {
            self.parts.extend(parts);
            self.parts.push_back(String::new());
        }
        if let Some(received) = received {
            self.parts.extend(parts_of(received).into_iter().filter(|part| !part.is_empty()));
            self.parts.push_back(String::new());
        }
        in_line
    }

    /// Returns the part to type in response to TAKE, if any is left.
    pub(super) fn next_part(&mut self) -> Option<String> {
        self.parts.pop_front()
    }

    /// Returns the line with `mark` to type in response to ASK. `asked` is the number of earlier ASKs of the
    /// same script; its letter tells the shell which of them the response is for.
    pub(super) fn answer(&self, mark: Mark, asked: u8) -> String {
        let mark = mark.as_str();
        if !self.is_used() {
            return format!("{mark}..\n");
        }
        format!("{mark}{}{TAIL}..\n", char::from(b'a' + asked))
    }
}

/// Encodes `bytes` for `printf %b` in single quotes, in parts that a terminal accepts.
pub(super) fn parts_of(bytes: &[u8]) -> Vec<String> {
    let mut parts = vec![String::new()];
    for byte in bytes {
        let mut last = parts.pop().unwrap_or_default();
        if last.len() >= LONGEST_PART {
            parts.push(std::mem::take(&mut last));
        }
        match byte {
            b'\n' => last.push_str("\\n"),
            // A quote would end the argument, and a backslash would begin an escape.
            b' '..=b'~' if !matches!(byte, b'\'' | b'\\') => last.push(char::from(*byte)),
            // Writing to a string never fails.
            _ => drop(write!(last, "\\0{byte:03o}")),
        }
        parts.push(last);
    }
    parts
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Write as _};
    use std::process::Command;

    use nix::pty::openpty;
    use nix::sys::termios::{LocalFlags, tcgetattr};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_short_script_is_in_the_line_and_a_long_one_in_parts() {
        let mut typed = Typed::new("f");
        let mut lengths_of_parts = |script: &[u8], received: Option<&[u8]>| {
            let argument = typed.begin(script, received);
            let parts = std::iter::from_fn(|| typed.next_part());
            let lengths: Vec<_> = parts.map(|part| part.len()).collect();
            (argument, lengths)
        };
        let long = b"x".repeat(2 * LONGEST_PART);
        let in_line = Some("echo \\0047a\\0047\\n".to_owned());
        assert_eq!(lengths_of_parts(b"echo 'a'\n", None), (in_line, vec![]));
        assert_eq!(lengths_of_parts(&long, None).1, [LONGEST_PART, LONGEST_PART, 0]);
        assert_eq!(lengths_of_parts(b"x", Some(b"\x00")), (Some("x".to_owned()), vec![5, 0]));
        assert_eq!(lengths_of_parts(&long, Some(b"")).1, [LONGEST_PART, LONGEST_PART, 0, 0]);
    }

    /// In these modes `read` finds the end of a file when nothing was typed yet.
    #[test]
    fn a_part_arrives_although_the_job_has_left_modes_that_do_not_wait() {
        let receive = include_str!("typed.bash").replace("@TAKE@", "TAKE");
        let functions = receive.split_once("# Throws the shell back").unwrap().0;
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        let script = format!(
            "{functions}\nstty -echo -icanon min 0 time 0\n__agent_receive '{}'; exit $?",
            file.display()
        );
        let terminal = openpty(None, None).unwrap();
        let mut shell = Command::new("setsid");
        shell.args(["--wait", "--ctty", "bash", "-c", &script]).stdin(terminal.slave);
        let mut shell = shell.spawn().unwrap();
        let mut keyboard = File::from(terminal.master);
        let mut type_part = |part: &str| {
            let mut asked = [0; 6];
            keyboard.read_exact(&mut asked).unwrap();
            assert_eq!(&asked, b"\x01TAKE\x01");
            // The shell has found nothing, and has reset the modes.
            while !tcgetattr(&keyboard).unwrap().local_flags.contains(LocalFlags::ICANON) {
                assert!(shell.try_wait().unwrap().is_none(), "the shell has given up");
                std::thread::yield_now();
            }
            keyboard.write_all(format!(".{part}..\n").as_bytes()).unwrap();
        };
        type_part(" a \\0047");
        type_part("");
        assert!(shell.wait().unwrap().success());
        assert_eq!(std::fs::read(file).unwrap(), b" a '");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn printf_restores_every_byte(
            bytes in prop::collection::vec(any::<u8>(), 0..9000),
        ) {
            let parts = parts_of(&bytes);
            prop_assert!(parts.iter().all(|part| part.len() <= LONGEST_PART + 5));
            prop_assert!(parts.concat().bytes().all(|byte| (b' '..=b'~').contains(&byte)));
            let quoted: Vec<_> = parts.iter().map(|part| format!("'{part}'")).collect();
            let script = format!("for part in {}; do printf %b \"$part\"; done", quoted.join(" "));
            let printed = Command::new("bash").args(["-c", &script]).output().unwrap();
            prop_assert_eq!(printed.stdout, bytes);
        }
    }
}
