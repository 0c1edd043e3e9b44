//! Scripts for a shell that can't read this machine's files: typed on its terminal, part by part.
//!
//! A terminal takes lines of at most 4095 bytes and heeds control characters, so a script travels as
//! printable text that `printf %b` turns back into its bytes. A short one is an argument of the typed line
//! itself. A long one follows in parts, each of which the shell asks for with the frame TAKE, when the
//! terminal's echo is off. So does what a script receives while it runs.

use std::collections::VecDeque;
use std::fmt::Write as _;

use super::Mark;

/// The longest part, in bytes: what a terminal takes, less the rest of the line it stands in.
const LONGEST_PART: usize = 3500;

/// What is being typed.
#[derive(Debug, Default)]
pub(super) struct Typed {
    /// Where the shell keeps the script that it runs.
    file: String,
    /// Still to be asked for; an empty one ends what is received at once.
    parts: VecDeque<String>,
}

/// Follows a script's mark when it is typed: it comes through only on a terminal that takes every character as it
/// is.
pub(super) const TAIL: &str = "!\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~";

/// What follows a mark that may be echoed; `?` is the letter of the question that it answers.
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

    /// `script` if it fits the typed line; if not, the shell is to ask for its parts. `received` is what it will ask
    /// for itself.
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

    /// The shell has asked: what to type now, if anything.
    pub(super) fn next_part(&mut self) -> Option<String> {
        self.parts.pop_front()
    }

    /// The line with `mark` that answers the shell's question, of which `asked` came before for the same script.
    pub(super) fn answer(&self, mark: Mark, asked: u8) -> String {
        let mark = mark.as_str();
        if !self.is_used() {
            return format!("{mark}..\n");
        }
        format!("{mark}{}{TAIL}..\n", char::from(b'a' + asked))
    }
}

/// `bytes` for `printf %b`, in single quotes, in parts that a terminal takes.
pub(super) fn parts_of(bytes: &[u8]) -> Vec<String> {
    let mut parts = vec![String::new()];
    for byte in bytes {
        let mut last = parts.pop().unwrap_or_default();
        if last.len() >= LONGEST_PART {
            parts.push(std::mem::take(&mut last));
        }
        match byte {
            b'\n' => last.push_str("\\n"),
            // A quote would end the argument, and a backslash is what escapes.
            b' '..=b'~' if !matches!(byte, b'\'' | b'\\') => last.push(char::from(*byte)),
            // Fails only if writing to a string does.
            _ => drop(write!(last, "\\0{byte:03o}")),
        }
        parts.push(last);
    }
    parts
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_short_script_stands_in_the_line_and_a_long_one_comes_in_parts() {
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn printf_gives_back_every_byte(
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
