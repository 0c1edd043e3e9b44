//! Finds a line in a log file without reading it from the start. Pure.
//!
//! Only every so often a line's offset is remembered, so the index of a large log stays small, and
//! what must be scanned to reach any line is bounded.

/// A remembered line is at most this many lines from the next one...
const LINES_APART: u64 = 64;
/// ...and at most this many bytes plus one line.
const BYTES_APART: u64 = 64 * 1024;

/// A line's number (0 based) and its offset in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The line's number.
    pub line: u64,
    /// Where it begins.
    pub offset: u64,
}

/// A sparse map from line numbers to offsets.
#[derive(Debug)]
pub struct LogIndex {
    remembered: Vec<Position>,
    end: Position,
}

impl Default for LogIndex {
    fn default() -> Self {
        let start = Position { line: 0, offset: 0 };
        Self { remembered: vec![start], end: start }
    }
}

impl LogIndex {
    /// A line of `bytes` bytes, its newline included, was written at the end.
    pub fn append(&mut self, bytes: u64) {
        self.end = Position { line: self.end.line + 1, offset: self.end.offset + bytes };
        let last = self.remembered[self.remembered.len() - 1];
        if self.end.line - last.line >= LINES_APART || self.end.offset - last.offset >= BYTES_APART
        {
            self.remembered.push(self.end);
        }
    }

    /// One past the last line.
    pub fn end(&self) -> Position {
        self.end
    }

    /// The nearest remembered position at or before `line`.
    pub fn at_or_before(&self, line: u64) -> Position {
        let after = self.remembered.partition_point(|position| position.line <= line);
        self.remembered[after.saturating_sub(1)]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_remembered_line_is_always_near(lengths in prop::collection::vec(1..70_000u64, 0..500)) {
            let mut index = LogIndex::default();
            let mut offsets = vec![0];
            for length in &lengths {
                index.append(*length);
                offsets.push(offsets[offsets.len() - 1] + length);
            }
            for (line, offset) in offsets.iter().enumerate() {
                let near = index.at_or_before(line as u64);
                prop_assert_eq!(near.offset, offsets[usize::try_from(near.line).unwrap()]);
                prop_assert!(line as u64 - near.line < LINES_APART);
                prop_assert!(offset - near.offset < BYTES_APART);
            }
            prop_assert_eq!(index.end().line, lengths.len() as u64);
        }
    }

    #[test]
    fn it_stays_small() {
        let mut index = LogIndex::default();
        (0..500_000).for_each(|_| index.append(100));
        assert!(index.remembered.len() < 10_000, "{}", index.remembered.len());
        assert_eq!(index.at_or_before(u64::MAX).line, 500_000 / LINES_APART * LINES_APART);
    }
}
