//! Finds the shell's frames in the terminal's bytes. Pure.
//!
//! With frames the shell tells the agent what it is doing. They are in the same stream as the output of
//! commands, so that their order is certain. Each frame begins and ends with byte 1:
//!
//! | frame | meaning |
//! | --- | --- |
//! | `\1READY\1` | the shell has read its startup files |
//! | `\1BEGIN\1` | the script's first line runs |
//! | `\1TAKE\1` | the shell waits for the next part of what is typed |
//! | `\1PROMPT WORD\1` | the shell is at its prompt; with the current script's WORD, the script was interrupted |
//! | `\1ASK\1` | the script may have ended; the shell waits for the script's mark on its input |
//! | `\1MARK EXIT-CODE FLAGS RESULT\1` | the script has ended |
//! | `\1GONE HOW\1` | the shell itself has ended |
//!
//! READY, TAKE, PROMPT and GONE stand for 128-bit random words of the session, BEGIN, WORD, ASK and MARK for
//! those of the current script. The shell gets ASK in the typed line, which no program that it runs can look
//! up, and MARK only in response to ASK. Everything else is output, byte for byte, except an echo of MARK.

use std::io;
use std::ops::Range;

use crate::os::random::random_word;

/// The byte that begins and ends a frame.
const EDGE: u8 = 1;

/// The longest frame with fields, in bytes; the shell cuts what it puts into one. A longer text is output.
const LONGEST_FRAME: usize = 512;

/// The echo of a line's end: usually, without output processing (`-opost`), and without canonical mode
/// (`-icanon`).
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

/// Never shows the mark: a program that knows the mark could end a script.
impl std::fmt::Debug for Mark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Mark(…)")
    }
}

/// The meaning of a piece of the stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// Output: these bytes of the buffer.
    Output(Range<usize>),
    /// The shell has read its startup files.
    Ready,
    /// The script runs.
    Begin,
    /// The shell waits for the next part of what is typed.
    Take,
    /// The shell is back at its prompt without having ended the script.
    Prompt,
    /// The shell asks for the script's mark.
    Ask,
    /// The script has ended.
    End {
        /// The shell's `$?`.
        exit_code: i32,
        /// The shell's `$-`, and signs for other options (see [`super::job_options`]).
        flags: String,
        /// The shell's `$SEMAPHORE_JOB_RESULT`.
        job_result: String,
    },
    /// Not output: an echo of what the agent has typed, or the prompt of an old script.
    Ignored,
    /// The shell has ended; the text says how, and may be empty.
    Gone(String),
    /// More bytes are needed to tell output from the beginning of a frame.
    Incomplete,
}

/// The random words of one script.
#[derive(Debug)]
pub(super) struct ScriptWords {
    pub(super) begin: Mark,
    pub(super) prompt: Mark,
    pub(super) ask: Mark,
    pub(super) mark: Mark,
    /// The shell has asked for the mark. Before that, the mark was never typed, so it is not looked for.
    pub(super) mark_requested: bool,
    /// The agent's words before the script's own text in its file; empty once the script has begun.
    pub(super) first_words: Vec<u8>,
}

impl ScriptWords {
    pub(super) fn random() -> Result<Self, io::Error> {
        let [begin, prompt] = [Mark::random()?, Mark::random()?];
        let [ask, mark] = [Mark::random()?, Mark::random()?];
        Ok(Self { begin, prompt, ask, mark, mark_requested: false, first_words: Vec::new() })
    }
}

/// A frame with fields behind its word.
#[derive(Clone, Copy)]
enum Frame {
    End,
    Prompt,
    Gone,
}

/// The words of the session and of its current script, by which frames are recognised.
#[derive(Debug)]
pub(super) struct Frames {
    pub(super) ready: Mark,
    pub(super) take: Mark,
    pub(super) prompt: Mark,
    gone: Mark,
    /// The words of the current script.
    pub(super) script: Option<ScriptWords>,
    /// The text behind the mark in a typed line, which may be echoed with it; each `?` stands for any byte.
    pub(super) after_mark: Vec<u8>,
}

impl Frames {
    /// Returns frames with random words, except for `gone`, which job-init knows as well.
    pub(super) fn new(gone: Mark) -> Result<Self, io::Error> {
        let [ready, take, prompt] = [Mark::random()?, Mark::random()?, Mark::random()?];
        Ok(Self { ready, take, prompt, gone, script: None, after_mark: Vec::new() })
    }

    /// Returns the first piece of `bytes`, and its length in bytes.
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
        let mark =
            self.script.as_ref().filter(|script| script.mark_requested).map(|script| &script.mark);
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
                    None if body.len() < LONGEST_FRAME => incomplete = true,
                    None => {}
                },
                Some(false) => {}
                None => incomplete |= word.is_some(),
            }
        }
        if incomplete {
            return (Piece::Incomplete, 0);
        }
        // This byte 1 is the job's own output.
        let next_edge = memchr::memchr(EDGE, body).map_or(bytes.len(), |at| at + 1);
        (Piece::Output(0..next_edge), next_edge)
    }

    /// Returns the first piece of `output`, in which no frame begins. `is_followed` tells whether a byte 1
    /// follows it.
    fn output(&self, output: &[u8], is_followed: bool) -> (Piece, usize) {
        let Some((hidden, after)) = self.script.as_ref().and_then(|script| self.hidden(script))
        else {
            return (Piece::Output(0..output.len()), output.len());
        };
        let may_begin = |at: &usize| starts_with(&output[*at..], hidden) != Some(false);
        // Searching for the first byte is fast, and the full comparison is rarely needed.
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
                return (Piece::Ignored, hidden.len() + echoed(&output[hidden.len()..], after));
            }
            Some(at) => at,
            None => output.len(),
        };
        (Piece::Output(0..length), length)
    }

    /// Returns the text that is hidden from the output, and what may follow it up to the end of its line.
    ///
    /// Before the script has begun, this is its first words: bash shows them with a syntax error in the first
    /// line. After ASK it is the mark: the shell reads it with the echo off, but in POSIX mode a trapped
    /// signal ends the reading, and what is typed before the shell reads again is echoed.
    fn hidden<'a>(&'a self, script: &'a ScriptWords) -> Option<(&'a [u8], &'a [u8])> {
        if script.mark_requested {
            Some((&script.mark.0, &self.after_mark))
        } else if script.first_words.is_empty() {
            None
        } else {
            Some((&script.first_words, b""))
        }
    }

    fn parse_prompt(&self, fields: &str) -> Option<Piece> {
        let word = fields.strip_prefix(' ')?;
        let has_word = |script: &ScriptWords| script.prompt.as_str().eq_ignore_ascii_case(word);
        let is_current = self.script.as_ref().is_some_and(has_word);
        Some(if is_current { Piece::Prompt } else { Piece::Ignored })
    }
}

/// Parses ` EXIT-CODE FLAGS RESULT`. Only the shell can have written it, as it follows the mark.
fn parse_end(fields: &str) -> Option<Piece> {
    let mut fields = fields.strip_prefix(' ')?.splitn(3, ' ');
    let exit_code = fields.next()?.parse().ok()?;
    let flags = fields.next()?.to_owned();
    let job_result = fields.next().unwrap_or_default().to_owned();
    Some(Piece::End { exit_code, flags, job_result })
}

/// Returns how many bytes at the beginning of `shown` are the echo of `typed` and its line end. A `?` in
/// `typed` stands for any byte.
fn echoed(shown: &[u8], typed: &[u8]) -> usize {
    let is_shown = |(shown, typed): &(&u8, &u8)| shown == typed || **typed == b'?';
    let length = shown.iter().zip(typed).take_while(is_shown).count();
    if typed.is_empty() || length < typed.len() {
        return length;
    }
    let end = LINE_ENDS.iter().find(|end| shown[length..].starts_with(end));
    length + end.map_or(0, |end| end.len())
}

/// Returns whether `bytes` starts with `word`; `None` if there are too few bytes to tell. Case is ignored, as
/// a terminal may be set to capitals (`olcuc`).
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

    fn frames(mark_requested: bool) -> Frames {
        let script = ScriptWords {
            begin: BEGIN,
            prompt: PROMPT,
            ask: ASK,
            mark: SCRIPT,
            mark_requested,
            first_words: b"first".to_vec(),
        };
        let (ready, take, prompt, gone) = (READY, TAKE, SESSION, GONE);
        Frames { ready, take, prompt, gone, script: Some(script), after_mark: b"?~..".to_vec() }
    }

    /// Parses a stream that arrives in `chunks`. Returns the output, and the other pieces in order.
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
                Piece::Ignored,
                Piece::Ask,
                Piece::Take,
                end,
                gone,
            ];
            assert_eq!(pieces, expected, "split at {at}");
        }
    }

    #[test]
    fn a_mark_that_was_not_requested_is_output() {
        let stream = framed(&format!("{} 0 hB ", SCRIPT.as_str()));
        assert_eq!(parse(&frames(false), &[&stream]), (stream.clone(), vec![]));
    }

    #[test]
    fn the_echo_of_a_mark_is_hidden_wherever_the_stream_is_split() {
        let mark = SCRIPT.as_str();
        let end = framed(&format!("{mark} 0 hB "));
        for line_end in LINE_ENDS {
            let stream = [b"out", mark.as_bytes(), b"a~..", line_end, b"\rput 555", &end].concat();
            for at in 0..stream.len() {
                let chunks = [&stream[..at], &stream[at..]];
                let (output, pieces) = parse(&frames(true), &chunks);
                assert_eq!(output, b"out\rput 555", "split at {at}");
                assert!(matches!(pieces[..], [Piece::Ignored, Piece::End { .. }]), "{pieces:?}");
            }
        }
    }

    #[test]
    fn a_scripts_first_words_are_hidden_until_it_has_begun() {
        let stream = b"line 1: `firstif then'";
        for at in 0..stream.len() {
            let (output, pieces) = parse(&frames(false), &[&stream[..at], &stream[at..]]);
            assert_eq!(
                (&output[..], &pieces[..]),
                (&b"line 1: `if then'"[..], &[Piece::Ignored][..])
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
    fn marks_are_random_and_not_in_debug_output() {
        let (one, two) = (Mark::random().unwrap(), Mark::random().unwrap());
        assert_ne!(one, two);
        assert!(!format!("{one:?}").contains(one.as_str()));
    }

    proptest! {
        #[test]
        fn output_is_never_lost_or_taken_for_frames(
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
