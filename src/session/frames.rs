//! Finds the shell's frames in the terminal's bytes. Pure.
//!
//! Frames are how the shell tells the agent what it does, in the same stream as the output of
//! commands, so that their order is certain. Each begins and ends with byte 1:
//!
//! | frame | meaning |
//! | --- | --- |
//! | `\1ASK\1` | a script may be over; the shell waits for the script's mark on its input |
//! | `\1TAKE\1` | the shell wants the next part of what is typed, or its line editor has shown all of a line |
//! | `\1MARK EXIT-CODE FLAGS RESULT\1` | the script is over |
//! | `\1GONE\1` | the shell itself is over |
//!
//! ASK, TAKE and GONE are 128-bit random words of the session, MARK one of the script, made only when the
//! shell asks for it. Everything else is output, byte for byte, but for an echo of MARK.

use std::ops::Range;

/// The byte around frames.
const EDGE: u8 = 1;

/// No ending frame is longer than this, in bytes; the shell shortens what it puts into one.
const LONGEST_END: usize = 512;

/// A 128-bit random word that can't be guessed, as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Mark([u8; 32]);

impl Mark {
    /// A fresh one.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut random = [0; 16];
        getrandom::fill(&mut random)?;
        let mut digits = [0; 32];
        for (pair, byte) in digits.chunks_exact_mut(2).zip(random) {
            pair[0] = b"0123456789abcdef"[usize::from(byte >> 4)];
            pair[1] = b"0123456789abcdef"[usize::from(byte & 15)];
        }
        Ok(Self(digits))
    }

    /// Its digits.
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
    /// The shell asks for the script's mark.
    Ask,
    /// The shell wants what was typed, or the next part of it.
    Take,
    /// The script is over.
    End {
        /// The shell's `$?`.
        exit_code: i32,
        /// The shell's `$-`.
        flags: String,
        /// The shell's `$SEMAPHORE_JOB_RESULT`.
        job_result: String,
    },
    /// What the terminal showed of the script's mark when it was typed.
    Echo,
    /// The shell is over.
    Gone,
    /// The rest can't be told from the beginning of a frame until more bytes come.
    Incomplete,
}

/// Knows the session's words.
#[derive(Debug)]
pub(super) struct Frames {
    /// With what the shell asks for a script's mark.
    pub(super) ask: Mark,
    /// With what it answers a typed script.
    pub(super) take: Mark,
    gone: Mark,
    /// The mark of the running script, once the shell has asked for it.
    pub(super) script: Option<Mark>,
}

impl Frames {
    /// Frames with these words.
    pub(super) fn new(ask: Mark, take: Mark, gone: Mark) -> Self {
        Self { ask, take, gone, script: None }
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
        let words = [(&self.ask, Piece::Ask), (&self.take, Piece::Take), (&self.gone, Piece::Gone)];
        for (word, piece) in words {
            match starts_with(body, &word.0) {
                Some(true) if body.get(32) == Some(&EDGE) => return (piece, 34),
                Some(true) if body.len() == 32 => incomplete = true,
                Some(_) => {}
                None => incomplete = true,
            }
        }
        match self.script.as_ref().and_then(|mark| starts_with(body, &mark.0)) {
            Some(true) => match memchr::memchr(EDGE, &body[32..]) {
                Some(length) => {
                    let piece = parse_end(&body[32..32 + length]);
                    let taken = 32 + length + 2;
                    return (piece.unwrap_or(Piece::Output(0..taken)), taken);
                }
                None if body.len() < LONGEST_END => incomplete = true,
                None => {}
            },
            Some(false) => {}
            None => incomplete |= self.script.is_some(),
        }
        if incomplete {
            return (Piece::Incomplete, 0);
        }
        // A byte 1 of the job's own.
        let next_edge = memchr::memchr(EDGE, body).map_or(bytes.len(), |at| at + 1);
        (Piece::Output(0..next_edge), next_edge)
    }

    /// The first piece of `output`, in which no frame begins. `is_followed` by one, perhaps.
    ///
    /// The shell waits for its script's mark with the echo off; but in POSIX mode a trapped signal ends its
    /// wait, and what is typed before the next one is echoed.
    fn output(&self, output: &[u8], is_followed: bool) -> (Piece, usize) {
        let Some(mark) = &self.script else {
            return (Piece::Output(0..output.len()), output.len());
        };
        let may_begin = |at: &usize| starts_with(&output[*at..], &mark.0) != Some(false);
        let length = match (0..output.len()).find(may_begin) {
            Some(0) => match output.get(mark.0.len()..) {
                None if !is_followed => return (Piece::Incomplete, 0),
                None => output.len(),
                Some(after) => match LINE_ENDS.iter().find(|end| after.starts_with(end)) {
                    Some(end) => return (Piece::Echo, mark.0.len() + end.len()),
                    None if after.len() < 2 && !is_followed => return (Piece::Incomplete, 0),
                    None => return (Piece::Echo, mark.0.len()),
                },
            },
            Some(at) => at,
            None => output.len(),
        };
        (Piece::Output(0..length), length)
    }
}

/// How a line's end is echoed: usually, by a terminal that leaves output alone, and by one that takes single
/// characters.
pub(super) const LINE_ENDS: [&[u8]; 3] = [b"\r\n", b"\n", b"^J"];

/// Whether `bytes` starts with `word`; nothing if there are too few to tell.
fn starts_with(bytes: &[u8], word: &[u8]) -> Option<bool> {
    let compared = bytes.len().min(word.len());
    if bytes[..compared] != word[..compared] {
        return Some(false);
    }
    (compared == word.len()).then_some(true)
}

/// ` EXIT-CODE FLAGS RESULT`, which only the shell can have written, as it follows the mark.
fn parse_end(fields: &[u8]) -> Option<Piece> {
    let text = String::from_utf8_lossy(fields);
    let mut fields = text.strip_prefix(' ')?.splitn(3, ' ');
    let exit_code = fields.next()?.parse().ok()?;
    let flags = fields.next()?.to_owned();
    let job_result = fields.next().unwrap_or_default().to_owned();
    Some(Piece::End { exit_code, flags, job_result })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ASK: Mark = Mark(*b"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa");
    const TAKE: Mark = Mark(*b"77777777777777777777777777777777");
    const GONE: Mark = Mark(*b"99999999999999999999999999999999");
    const SCRIPT: Mark = Mark(*b"55555555555555555555555555555555");

    fn frames(script: Option<Mark>) -> Frames {
        Frames { script, ..Frames::new(ASK, TAKE, GONE) }
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
        let stream = [
            b"out\x01put".to_vec(),
            framed(ASK.as_str()),
            framed(TAKE.as_str()),
            b"more".to_vec(),
            framed(&end),
            framed(GONE.as_str()),
        ]
        .concat();
        for at in 0..stream.len() {
            let (output, pieces) = parse(&frames(Some(SCRIPT)), &[&stream[..at], &stream[at..]]);
            assert_eq!(output, b"out\x01putmore", "split at {at}");
            let end =
                Piece::End { exit_code: 130, flags: "himBHs".into(), job_result: "passed".into() };
            assert_eq!(pieces, [Piece::Ask, Piece::Take, end, Piece::Gone], "split at {at}");
        }
    }

    #[test]
    fn nobody_ends_a_script_whose_mark_was_not_asked_for() {
        let stream = framed(&format!("{} 0 hB ", SCRIPT.as_str()));
        assert_eq!(parse(&frames(None), &[&stream]), (stream.clone(), vec![]));
    }

    #[test]
    fn the_echo_of_a_mark_is_no_output_wherever_the_stream_is_split() {
        let mark = SCRIPT.as_str();
        let end = framed(&format!("{mark} 0 hB "));
        for line_end in LINE_ENDS {
            let stream = [b"out", mark.as_bytes(), line_end, b"\rput 555", &end].concat();
            for at in 0..stream.len() {
                let chunks = [&stream[..at], &stream[at..]];
                let (output, pieces) = parse(&frames(Some(SCRIPT)), &chunks);
                assert_eq!(output, b"out\rput 555", "split at {at}");
                assert!(matches!(pieces[..], [Piece::Echo, Piece::End { .. }]), "{pieces:?}");
            }
        }
    }

    #[test]
    fn old_marks_and_lone_edges_are_output() {
        let old = framed("44444444444444444444444444444444 0 hB passed");
        let stream = [&old[..], b"\x01\x01\x01 \x01exit 0\x01"].concat();
        assert_eq!(parse(&frames(Some(SCRIPT)), &[&stream]), (stream.clone(), vec![]));
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
            let (output, pieces) = parse(&frames(Some(SCRIPT)), &slices);
            prop_assert_eq!(output, chunks.concat());
            prop_assert_eq!(pieces, vec![]);
        }
    }
}
