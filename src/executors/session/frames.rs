//! Finds the shell's frames in the terminal's bytes. Pure.
//!
//! Frames are how the shell tells the agent what it does, in the same stream as the output of
//! commands, so that their order is certain. Each begins and ends with byte 1:
//!
//! | frame | meaning |
//! | --- | --- |
//! | `\1READY\1` | the shell has read its startup files |
//! | `\1BEGIN\1` | the script's first line runs |
//! | `\1TAKE\1` | the shell wants the next part of what is typed |
//! | `\1PROMPT WORD\1` | the shell is at its prompt; before the script has ended if WORD is that script's |
//! | `\1ASK\1` | the script may be over; the shell waits for the script's mark on its input |
//! | `\1MARK EXIT-CODE FLAGS RESULT\1` | the script is over |
//! | `\1GONE HOW\1` | the shell itself is over |
//!
//! Each is a 128-bit random word. READY, TAKE, PROMPT and GONE are the session's, BEGIN, WORD, ASK and MARK
//! the script's: the shell gets ASK in the typed line, which nothing that it runs can look up, and MARK only when it
//! asks. Everything else is output, byte for byte, but for an echo of MARK.

use std::io;
use std::ops::Range;

use crate::os::random::random_word;

/// The byte around frames.
const EDGE: u8 = 1;

/// No ending frame is longer than this, in bytes; the shell shortens what it puts into one.
const LONGEST_END: usize = 512;

/// How a line's end is echoed: usually, by a terminal that leaves output alone, and by one that takes single
/// characters.
const LINE_ENDS: [&[u8]; 3] = [b"\r\n", b"\n", b"^J"];

/// A 128-bit random word that can't be guessed, as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Mark([u8; 32]);

impl Mark {
    /// Returns a fresh mark.
    pub fn random() -> io::Result<Self> {
        let mut digits = [0; 32];
        digits.copy_from_slice(random_word()?.as_bytes());
        Ok(Self(digits))
    }

    /// Returns the mark's digits.
    pub fn as_str(&self) -> &str {
        // Hexadecimal digits are ASCII.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

/// Never shows the mark: who knows it can end a script.
impl std::fmt::Debug for Mark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Mark(…)")
    }
}

/// What a piece of the stream is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// Output: these bytes of the buffer.
    Output(Range<usize>),
    /// The shell can be typed to.
    Ready,
    /// The script runs.
    Begin,
    /// The shell wants the next part of what is typed.
    Take,
    /// The shell has left the script without ending it.
    Prompt,
    /// The shell asks for the script's mark.
    Ask,
    /// The script is over.
    End {
        /// The shell's `$?`.
        exit_code: i32,
        /// The shell's `$-`, and what else is on.
        flags: String,
        /// The shell's `$SEMAPHORE_JOB_RESULT`.
        job_result: String,
    },
    /// No output: what the terminal showed of the agent's own words, or an old script's prompt.
    Nothing,
    /// The shell is over; the words of who has seen its end, if there are any.
    Gone(String),
    /// The rest can't be told from the beginning of a frame until more bytes come.
    Incomplete,
}

/// The words of one script.
#[derive(Debug)]
pub(super) struct ScriptWords {
    pub(super) begin: Mark,
    pub(super) prompt: Mark,
    pub(super) ask: Mark,
    pub(super) mark: Mark,
    /// The shell has asked for the mark; before that, nobody can know it.
    pub(super) is_asked: bool,
    /// What stands before the script's own text in its first line, until that has begun.
    pub(super) first_words: Vec<u8>,
}

impl ScriptWords {
    pub(super) fn random() -> Result<Self, io::Error> {
        let [begin, prompt] = [Mark::random()?, Mark::random()?];
        let [ask, mark] = [Mark::random()?, Mark::random()?];
        Ok(Self { begin, prompt, ask, mark, is_asked: false, first_words: Vec::new() })
    }
}

/// A frame with fields behind its word.
#[derive(Clone, Copy)]
enum Frame {
    End,
    Prompt,
    Gone,
}

/// Knows the words.
#[derive(Debug)]
pub(super) struct Frames {
    pub(super) ready: Mark,
    pub(super) take: Mark,
    pub(super) prompt: Mark,
    gone: Mark,
    /// Those of the running script.
    pub(super) script: Option<ScriptWords>,
    /// What follows the mark in the line that is typed, which may be echoed; each `?` stands for any byte.
    pub(super) after_mark: Vec<u8>,
}

impl Frames {
    /// Frames whose words are random but for the last.
    pub(super) fn new(gone: Mark) -> Result<Self, io::Error> {
        let [ready, take, prompt] = [Mark::random()?, Mark::random()?, Mark::random()?];
        Ok(Self { ready, take, prompt, gone, script: None, after_mark: Vec::new() })
    }

    /// The first piece of `bytes`, and how many bytes it takes.
    pub(super) fn next_piece(&self, bytes: &[u8]) -> (Piece, usize) {
        let edge = memchr::memchr(EDGE, bytes).unwrap_or(bytes.len());
        if edge > 0 {
            return self.output(&bytes[..edge], edge < bytes.len());
        }
        if bytes.is_empty() {
            return (Piece::Incomplete, 0);
        }
        let body = &bytes[1..];
        let mut incomplete = false;
        let words = [
            (Some(&self.ready), Piece::Ready),
            (Some(&self.take), Piece::Take),
            (self.script.as_ref().map(|script| &script.begin), Piece::Begin),
            (self.script.as_ref().map(|script| &script.ask), Piece::Ask),
        ];
        for (word, piece) in words {
            match word.and_then(|word| starts_with(body, &word.0)) {
                Some(true) if body.get(32) == Some(&EDGE) => return (piece, 34),
                Some(true) if body.len() == 32 => incomplete = true,
                Some(_) => {}
                None => incomplete |= word.is_some(),
            }
        }
        let mark = self.script.as_ref().filter(|script| script.is_asked).map(|script| &script.mark);
        let with_fields = [
            (mark, Frame::End),
            (Some(&self.prompt), Frame::Prompt),
            (Some(&self.gone), Frame::Gone),
        ];
        for (word, frame) in with_fields {
            match word.and_then(|word| starts_with(body, &word.0)) {
                Some(true) => match memchr::memchr(EDGE, &body[32..]) {
                    Some(length) => {
                        let fields = String::from_utf8_lossy(&body[32..32 + length]);
                        let piece = match frame {
                            Frame::End => parse_end(&fields),
                            Frame::Prompt => self.parse_prompt(&fields),
                            Frame::Gone => Some(Piece::Gone(fields.trim().to_owned())),
                        };
                        let taken = 32 + length + 2;
                        return (piece.unwrap_or(Piece::Output(0..taken)), taken);
                    }
                    None if body.len() < LONGEST_END => incomplete = true,
                    None => {}
                },
                Some(false) => {}
                None => incomplete |= word.is_some(),
            }
        }
        if incomplete {
            return (Piece::Incomplete, 0);
        }
        // A byte 1 of the job's own.
        let next_edge = memchr::memchr(EDGE, body).map_or(bytes.len(), |at| at + 1);
        (Piece::Output(0..next_edge), next_edge)
    }

    /// The first piece of `output`, in which no frame begins. `is_followed` by one, perhaps.
    fn output(&self, output: &[u8], is_followed: bool) -> (Piece, usize) {
        let Some((hidden, after)) = self.script.as_ref().and_then(|script| self.hidden(script))
        else {
            return (Piece::Output(0..output.len()), output.len());
        };
        let may_begin = |at: &usize| starts_with(&output[*at..], hidden) != Some(false);
        // A first byte that is rare is looked for quickly.
        let first = memchr::memchr_iter(hidden.first().copied().unwrap_or_default(), output);
        let length = match first.into_iter().find(may_begin) {
            Some(0) => {
                let longest = hidden.len() + after.len() + 2;
                if output.len() < longest && !is_followed {
                    return (Piece::Incomplete, 0);
                }
                if output.len() < hidden.len() {
                    return (Piece::Output(0..output.len()), output.len());
                }
                return (Piece::Nothing, hidden.len() + echoed(&output[hidden.len()..], after));
            }
            Some(at) => at,
            None => output.len(),
        };
        (Piece::Output(0..length), length)
    }

    /// What is no output if it is seen, and what may follow it, its end of the line included.
    ///
    /// Before the script has begun, its first words: bash shows them with an error of syntax in its first line.
    /// When its mark is typed, that: the shell waits for it with the echo off; but in POSIX mode a trapped
    /// signal ends its wait, and what is typed before the next one is echoed.
    fn hidden<'a>(&'a self, script: &'a ScriptWords) -> Option<(&'a [u8], &'a [u8])> {
        if script.is_asked {
            Some((&script.mark.0, &self.after_mark))
        } else if script.first_words.is_empty() {
            None
        } else {
            Some((&script.first_words, b""))
        }
    }

    fn parse_prompt(&self, fields: &str) -> Option<Piece> {
        let word = fields.strip_prefix(' ')?;
        let is_it = |script: &ScriptWords| script.prompt.as_str().eq_ignore_ascii_case(word);
        let is_now = self.script.as_ref().is_some_and(is_it);
        Some(if is_now { Piece::Prompt } else { Piece::Nothing })
    }
}

/// ` EXIT-CODE FLAGS RESULT`, which only the shell can have written, as it follows the mark.
fn parse_end(fields: &str) -> Option<Piece> {
    let mut fields = fields.strip_prefix(' ')?.splitn(3, ' ');
    let exit_code = fields.next()?.parse().ok()?;
    let flags = fields.next()?.to_owned();
    let job_result = fields.next().unwrap_or_default().to_owned();
    Some(Piece::End { exit_code, flags, job_result })
}

/// How many bytes of `shown` are `typed` and the end of its line; a `?` in `typed` stands for any byte.
fn echoed(shown: &[u8], typed: &[u8]) -> usize {
    let is_shown = |(shown, typed): &(&u8, &u8)| shown == typed || **typed == b'?';
    let length = shown.iter().zip(typed).take_while(is_shown).count();
    if typed.is_empty() || length < typed.len() {
        return length;
    }
    let end = LINE_ENDS.iter().find(|end| shown[length..].starts_with(end));
    length + end.map_or(0, |end| end.len())
}

/// Whether `bytes` starts with `word`; `None` if there are too few to tell. A terminal may show capitals only.
fn starts_with(bytes: &[u8], word: &[u8]) -> Option<bool> {
    let compared = bytes.len().min(word.len());
    if !bytes[..compared].eq_ignore_ascii_case(&word[..compared]) {
        return Some(false);
    }
    (compared == word.len()).then_some(true)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ASK: Mark = Mark(*b"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa");
    const TAKE: Mark = Mark(*b"77777777777777777777777777777777");
    const READY: Mark = Mark(*b"66666666666666666666666666666666");
    const PROMPT: Mark = Mark(*b"88888888888888888888888888888888");
    const SESSION: Mark = Mark(*b"22222222222222222222222222222222");
    const BEGIN: Mark = Mark(*b"bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb");
    const GONE: Mark = Mark(*b"99999999999999999999999999999999");
    const SCRIPT: Mark = Mark(*b"55555555555555555555555555555555");

    fn frames(is_asked: bool) -> Frames {
        let script = ScriptWords {
            begin: BEGIN,
            prompt: PROMPT,
            ask: ASK,
            mark: SCRIPT,
            is_asked,
            first_words: b"first".to_vec(),
        };
        let (ready, take, prompt, gone) = (READY, TAKE, SESSION, GONE);
        Frames { ready, take, prompt, gone, script: Some(script), after_mark: b"?~..".to_vec() }
    }

    /// Parses a stream that arrives in chunks: the output, and the other pieces in order.
    fn parse(frames: &Frames, chunks: &[&[u8]]) -> (Vec<u8>, Vec<Piece>) {
        let (mut output, mut pieces, mut buffer) = (Vec::new(), Vec::new(), Vec::new());
        for chunk in chunks {
            buffer.extend_from_slice(chunk);
            loop {
                let (piece, taken) = frames.next_piece(&buffer);
                match piece {
                    Piece::Incomplete => break,
                    Piece::Output(range) => output.extend_from_slice(&buffer[range]),
                    other => pieces.push(other),
                }
                buffer.drain(..taken);
            }
        }
        output.extend(buffer);
        (output, pieces)
    }

    fn framed(text: &str) -> Vec<u8> {
        format!("\x01{text}\x01").into_bytes()
    }

    #[test]
    fn frames_are_found_wherever_the_stream_is_split() {
        let end = format!("{} 130 himBHs passed", SCRIPT.as_str());
        let gone = format!("{} exit code 3", GONE.as_str());
        let stream = [
            framed(READY.as_str()),
            framed(BEGIN.as_str()),
            b"out\x01put".to_vec(),
            framed(&format!("{} {}", SESSION.as_str(), PROMPT.as_str())),
            framed(&format!("{} {}", SESSION.as_str(), TAKE.as_str())),
            framed(ASK.as_str()),
            framed(TAKE.as_str()),
            b"more".to_vec(),
            framed(&end),
            framed(&gone),
        ]
        .concat();
        for at in 0..stream.len() {
            let (output, pieces) = parse(&frames(true), &[&stream[..at], &stream[at..]]);
            assert_eq!(output, b"out\x01putmore", "split at {at}");
            let end =
                Piece::End { exit_code: 130, flags: "himBHs".into(), job_result: "passed".into() };
            let gone = Piece::Gone("exit code 3".into());
            let expected = [
                Piece::Ready,
                Piece::Begin,
                Piece::Prompt,
                Piece::Nothing,
                Piece::Ask,
                Piece::Take,
                end,
                gone,
            ];
            assert_eq!(pieces, expected, "split at {at}");
        }
    }

    #[test]
    fn nobody_ends_a_script_whose_mark_was_not_asked_for() {
        let stream = framed(&format!("{} 0 hB ", SCRIPT.as_str()));
        assert_eq!(parse(&frames(false), &[&stream]), (stream.clone(), vec![]));
    }

    #[test]
    fn the_echo_of_a_mark_is_no_output_wherever_the_stream_is_split() {
        let mark = SCRIPT.as_str();
        let end = framed(&format!("{mark} 0 hB "));
        for line_end in LINE_ENDS {
            let stream = [b"out", mark.as_bytes(), b"a~..", line_end, b"\rput 555", &end].concat();
            for at in 0..stream.len() {
                let chunks = [&stream[..at], &stream[at..]];
                let (output, pieces) = parse(&frames(true), &chunks);
                assert_eq!(output, b"out\rput 555", "split at {at}");
                assert!(matches!(pieces[..], [Piece::Nothing, Piece::End { .. }]), "{pieces:?}");
            }
        }
    }

    #[test]
    fn a_scripts_first_words_are_no_output_until_it_has_begun() {
        let stream = b"line 1: `firstif then'";
        for at in 0..stream.len() {
            let (output, pieces) = parse(&frames(false), &[&stream[..at], &stream[at..]]);
            assert_eq!(
                (&output[..], &pieces[..]),
                (&b"line 1: `if then'"[..], &[Piece::Nothing][..])
            );
        }
    }

    #[test]
    fn old_marks_and_lone_edges_are_output() {
        let old = framed("44444444444444444444444444444444 0 hB passed");
        let stream = [&old[..], b"\x01\x01\x01 \x01exit 0\x01"].concat();
        assert_eq!(parse(&frames(true), &[&stream]), (stream.clone(), vec![]));
    }

    #[test]
    fn marks_are_random_and_do_not_show() {
        let (one, two) = (Mark::random().unwrap(), Mark::random().unwrap());
        assert_ne!(one, two);
        assert!(!format!("{one:?}").contains(one.as_str()));
    }

    proptest! {
        #[test]
        fn bytes_of_a_job_are_never_lost_or_taken_for_frames(
            chunks in prop::collection::vec(
                prop::collection::vec(prop_oneof![Just(1u8), Just(b'a'), Just(b'5'), Just(b' '), any::<u8>()], 0..80),
                0..6)
        ) {
            let slices: Vec<&[u8]> = chunks.iter().map(Vec::as_slice).collect();
            let (output, pieces) = parse(&frames(true), &slices);
            prop_assert_eq!(output, chunks.concat());
            prop_assert_eq!(pieces, vec![]);
        }
    }
}
