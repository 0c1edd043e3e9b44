//! Finds a line in a log file without reading the file from the start. Pure.
//!
//! The index remembers the offset of one line in 64, or in 64 KiB: it stays small for a large log,
//! and the part of the file to be scanned for any line is bounded.

/// The most lines from one remembered line to the next.
const LINES_APART: u64 = 64;
/// The most bytes from one remembered line to the next, not counting the last line in between.
const BYTES_APART: u64 = 64 * 1024;

/// A line's number (0 based) and its offset in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The number of the line, 0 based.
    pub line: u64,
    /// The offset of the line's first byte.
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
    /// Records that a line of `bytes` bytes, its newline included, was appended to the file.
    pub fn append(&mut self, bytes: u64) {
        self.end = Position { line: self.end.line + 1, offset: self.end.offset + bytes };
        let last = self.remembered[self.remembered.len() - 1];
        if self.end.line - last.line >= LINES_APART || self.end.offset - last.offset >= BYTES_APART
        {
            self.remembered.push(self.end);
        }
    }

    /// Returns the position behind the last line.
    pub fn end(&self) -> Position {
        self.end
    }

    /// Returns the last remembered position that is not behind `line`.
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
    fn the_index_of_a_large_log_is_small() {
        let mut index = LogIndex::default();
        (0..500_000).for_each(|_| index.append(100));
        assert!(index.remembered.len() < 10_000, "{}", index.remembered.len());
        assert_eq!(index.at_or_before(u64::MAX).line, 500_000 / LINES_APART * LINES_APART);
    }
}
