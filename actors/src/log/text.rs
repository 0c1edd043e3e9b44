//! Turns a terminal's bytes into the text of log events. Pure.
//!
//! `\r\n` becomes `\n`; each byte that is not UTF-8 becomes one U+FFFD. A UTF-8 sequence or a
//! `\r\n` that is split between two pushes is held back until it is whole, so that no event ends
//! inside one.

use crate::log::event::MAX_OUTPUT_LINE;

/// How many bytes the JSON of an output event has besides its text: keys, a 20-digit time, quotes.
const EVENT_OVERHEAD: usize = 96;

/// How many bytes of a pulled log's text are sent as an event without waiting for more.
pub const FULL_EVENT: usize = 24 * 1024;

/// Decodes terminal output, and keeps the text until it is taken for events.
#[derive(Debug)]
pub struct TerminalText {
    /// The longest encoded line of the log, in bytes.
    max_line: usize,
    text: String,
    /// The bytes of an unfinished UTF-8 sequence, or a `\r`.
    held: Vec<u8>,
}

impl Default for TerminalText {
    fn default() -> Self {
        Self::new(MAX_OUTPUT_LINE)
    }
}

impl TerminalText {
    /// Creates an empty one, for a log whose encoded lines have at most `max_line` bytes.
    pub const fn new(max_line: usize) -> Self {
        Self { max_line, text: String::new(), held: Vec::new() }
    }

    /// Adds bytes read from the terminal.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.held.is_empty() {
            self.decode(bytes);
        } else {
            let mut joined = std::mem::take(&mut self.held);
            joined.extend_from_slice(bytes);
            self.decode(&joined);
        }
    }

    /// Returns how many bytes of text can be taken now.
    pub fn len(&self) -> usize {
        self.text.len()
    }

    /// Whether there is no text to take. Bytes may still be held back.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    /// Makes text of the bytes held back: no more will come to complete them.
    pub fn finish(&mut self) {
        for byte in std::mem::take(&mut self.held) {
            self.text.push(if byte == b'\r' { '\r' } else { char::REPLACEMENT_CHARACTER });
        }
    }

    /// Takes everything that can be taken, cut so that each piece fits one log line.
    pub fn take(&mut self) -> Vec<String> {
        let text = std::mem::take(&mut self.text);
        cut_to_lines(text, self.max_line)
    }

    /// Takes only pieces that fill a log line; the rest stays to share a line with later text.
    pub fn take_full(&mut self) -> Vec<String> {
        let mut pieces = self.take();
        self.text = pieces.pop().unwrap_or_default();
        pieces
    }

    fn decode(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while let Some(at) = memchr::memchr(b'\r', rest) {
            match rest.get(at + 1) {
                Some(b'\n') => {
                    self.decode_utf8(&rest[..at], false);
                    self.text.push('\n');
                    rest = &rest[at + 2..];
                }
                Some(_) => {
                    self.decode_utf8(&rest[..at], false);
                    self.text.push('\r');
                    rest = &rest[at + 1..];
                }
                None => {
                    self.decode_utf8(&rest[..at], false);
                    self.held.push(b'\r');
                    return;
                }
            }
        }
        self.decode_utf8(rest, true);
    }

    /// Decodes `bytes`. If `more` may come, an unfinished sequence at their end is held back.
    fn decode_utf8(&mut self, mut bytes: &[u8], more: bool) {
        loop {
            let error = match std::str::from_utf8(bytes) {
                Ok(text) => return self.text.push_str(text),
                Err(error) => error,
            };
            let (valid, invalid) = bytes.split_at(error.valid_up_to());
            // `valid` is UTF-8, so the lossy conversion loses nothing.
            self.text.push_str(&String::from_utf8_lossy(valid));
            let length = match error.error_len() {
                Some(length) => length,
                None if more => return self.held.extend_from_slice(invalid),
                None => invalid.len(),
            };
            self.text.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, length));
            bytes = &invalid[length..];
        }
    }
}

/// Returns the encoded length of an ASCII byte in a JSON string, in bytes.
const fn encoded_len(byte: u8) -> usize {
    match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0c => 2,
        0..0x20 => 6,
        _ => 1,
    }
}

/// Cuts text into pieces whose events have at most `max_line` bytes each. Returns none for no text.
pub(crate) fn cut_to_lines(text: String, max_line: usize) -> Vec<String> {
    let budget = max_line - EVENT_OVERHEAD;
    if text.is_empty() {
        return Vec::new();
    }
    if text.len() * 6 <= budget || text.bytes().map(encoded_len).sum::<usize>() <= budget {
        return vec![text];
    }
    let mut pieces = Vec::new();
    let mut start = 0;
    let mut used = 0;
    for (at, character) in text.char_indices() {
        let needed: usize = match character.len_utf8() {
            1 => encoded_len(text.as_bytes()[at]),
            long => long,
        };
        if used + needed > budget {
            pieces.push(text[start..at].to_owned());
            (start, used) = (at, 0);
        }
        used += needed;
    }
    pieces.push(text[start..].to_owned());
    pieces
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::log::event::LogEvent;

    fn text_of(chunks: &[&[u8]]) -> String {
        let mut text = TerminalText::default();
        let mut all = String::new();
        for chunk in chunks {
            text.push(chunk);
            all.extend(text.take());
        }
        text.finish();
        all.extend(text.take());
        all
    }

    #[test]
    fn line_ends_become_newlines_wherever_they_are_split() {
        assert_eq!(text_of(&[b"a\r\nb"]), "a\nb");
        assert_eq!(text_of(&[b"a\r", b"\nb"]), "a\nb");
        assert_eq!(text_of(&[b"10%\r", b"20%\r"]), "10%\r20%\r");
        assert_eq!(text_of(&[b"a\r\r\nb"]), "a\r\nb");
        assert_eq!(text_of(&[b"a\r", b"\r", b"\n"]), "a\r\n");
    }

    #[test]
    fn each_invalid_byte_is_one_replacement() {
        assert_eq!(text_of(&[&[0x96; 5]]), "\u{fffd}".repeat(5));
        assert_eq!(text_of(&[b"\xe2\x82A"]), "\u{fffd}\u{fffd}A");
        assert_eq!(text_of(&[b"\xe2\x82\r\n"]), "\u{fffd}\u{fffd}\n");
        assert_eq!(text_of(&[b"\xe2\x82", b"\xac"]), "€");
        assert_eq!(text_of(&[b"\xe2", b"\x82"]), "\u{fffd}\u{fffd}");
    }

    #[test]
    fn held_back_bytes_are_not_text_yet() {
        let mut text = TerminalText::default();
        text.push(b"a\xf0\x9f");
        assert_eq!(text.take(), ["a"]);
        text.push(b"\x98\x80");
        assert_eq!(text.take(), ["😀"]);
    }

    /// Decodes all bytes at once, in the simplest way.
    fn reference(bytes: &[u8]) -> String {
        let mut out = String::new();
        let mut i = 0;
        while i < bytes.len() {
            if bytes[i..].starts_with(b"\r\n") {
                out.push('\n');
                i += 2;
                continue;
            }
            let sequence = (1..=4)
                .filter_map(|n| bytes.get(i..i + n))
                .find_map(|part| std::str::from_utf8(part).ok());
            out.push_str(sequence.unwrap_or("\u{fffd}"));
            i += sequence.map_or(1, str::len);
        }
        out
    }

    proptest! {
        #[test]
        fn any_bytes_in_any_chunks_give_the_same_text(
            chunks in prop::collection::vec(
                prop::collection::vec(
                    prop_oneof![any::<u8>(), Just(b'\r'), Just(b'\n'), Just(0xe2), Just(0x82), Just(0xac)], 0..40),
                0..8)
        ) {
            let slices: Vec<&[u8]> = chunks.iter().map(Vec::as_slice).collect();
            prop_assert_eq!(text_of(&slices), reference(&chunks.concat()));
        }

        #[test]
        fn every_piece_fits_its_line(seed in prop::collection::vec(any::<char>(), 1..200), times in 1..2000usize) {
            let whole: String = seed.iter().collect::<String>().repeat(times);
            let pieces = cut_to_lines(whole.clone(), MAX_OUTPUT_LINE);
            for piece in &pieces {
                let mut line = Vec::new();
                LogEvent::CmdOutput { timestamp: u64::MAX, output: piece.clone() }.encode(&mut line).unwrap();
                prop_assert!(line.len() <= MAX_OUTPUT_LINE, "{} bytes", line.len());
            }
            prop_assert_eq!(pieces.concat(), whole);
        }
    }
}
