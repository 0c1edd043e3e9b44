//! Output of every kind arrives byte for byte.

use std::path::Path;

use actors::log::event::{LogEvent, MAX_OUTPUT_LINE};

use test_support::{Finished, World};

const SIZE: usize = 16 * 1024 * 1024;

/// Runs a job that prints `content` from a file. Returns its output.
fn printed(content: &[u8]) -> String {
    let world = World::new();
    let file = world.file("content", content);
    let finished = world.run_commands(&[&format!("cat {}", file.display())]);
    assert_eq!(finished.result(), "passed", "{}", finished.stderr);
    check_lines(&finished);
    finished.output()
}

fn check_lines(finished: &Finished) {
    for event in &finished.events {
        if let LogEvent::CmdOutput { output, .. } = event {
            let encoded = serde_json::to_string(event).unwrap();
            assert!(encoded.len() < MAX_OUTPUT_LINE, "{} bytes", encoded.len());
            assert!(!output.is_empty());
        }
    }
}

fn assert_same(found: &str, expected: &str) {
    // Not `assert_eq!`, which would print both texts.
    let differ = found.bytes().zip(expected.bytes()).position(|(a, b)| a != b);
    assert!(
        found.len() == expected.len() && differ.is_none(),
        "{} bytes instead of {}, the first difference is at {differ:?}",
        found.len(),
        expected.len()
    );
}

fn repeated(pattern: &str) -> String {
    let mut text = pattern.repeat(SIZE / pattern.len());
    text.push('\n');
    text
}

#[test]
fn lines_arrive() {
    let text: String = (0..SIZE / 80).map(|i| format!("{i:079}\n")).collect();
    assert_same(&printed(text.as_bytes()), &text);
}

#[test]
fn megabytes_without_a_newline_arrive() {
    let text = "x".repeat(SIZE);
    assert_same(&printed(text.as_bytes()), &text);
}

#[test]
fn utf8_arrives_and_is_never_cut() {
    let text = repeated("aé€😀\n");
    assert_same(&printed(text.as_bytes()), &text);
}

#[test]
fn progress_bars_and_carriage_returns_arrive() {
    let text = repeated("\r 10% [##   ]\r\r\n 100%\r\n");
    assert_same(&printed(text.as_bytes()), &text);
}

#[test]
fn control_bytes_and_text_that_resembles_marks_arrive() {
    let text = repeated(
        "\u{1}0123456789abcdef0123456789abcdef 0 h passed\u{1}\u{1}\u{1b}[31m\u{7}\u{8}\\\"",
    );
    assert_same(&printed(text.as_bytes()), &text);
}

#[test]
fn random_bytes_arrive_with_a_replacement_for_each_invalid_one() {
    // A linear congruential generator: the same bytes in each run.
    let mut state = 1_u64;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    })
    .take(SIZE)
    .collect();
    let mut expected = String::new();
    let mut rest = &bytes[..];
    while let Err(error) = std::str::from_utf8(rest) {
        expected.push_str(std::str::from_utf8(&rest[..error.valid_up_to()]).unwrap());
        let invalid = error.error_len().unwrap_or(rest.len() - error.valid_up_to());
        expected.push_str(&"\u{fffd}".repeat(invalid));
        rest = &rest[error.valid_up_to() + invalid..];
    }
    expected.push_str(std::str::from_utf8(rest).unwrap());
    assert_same(&printed(&bytes), &expected);
}

#[test]
fn tiny_writes_arrive() {
    let finished =
        World::new().run_commands(&["for ((i = 0; i < 200000; i++)); do printf x; done"]);
    assert_same(&finished.output(), &"x".repeat(200_000));
    let events = finished.events.len();
    assert!(events < 20_000, "{events} events for 200 kB");
}

#[test]
fn many_writers_at_once_lose_nothing() {
    let writers =
        "for n in 1 2 3 4; do (for ((i = 0; i < 5000; i++)); do echo $n:$i; done) & done; wait";
    let output = World::new().run_commands(&["set +m", writers]).output();
    let mut found: Vec<&str> = output.lines().filter(|line| line.contains(':')).collect();
    let mut expected: Vec<String> =
        (1..=4).flat_map(|n| (0..5000).map(move |i| format!("{n}:{i}"))).collect();
    found.sort_unstable();
    expected.sort_unstable();
    assert_eq!(found.len(), expected.len());
    assert!(found == expected);
}

#[test]
fn the_log_is_private_while_the_job_runs_and_gone_afterwards() {
    let world = World::new();
    let state = world.state();
    let look = format!("find {0} -printf '%m %y %P\\n' | sort; umask", state.display());
    let finished = world.run_commands(&["umask 000", &look]);
    for line in finished.commands()[1].0.lines().filter(|line| line.contains(' ')) {
        let private = line.starts_with("700 d") || line.starts_with("600 f");
        assert!(private, "{line}");
    }
    assert!(finished.output().contains("log.jsonl"));
    assert_eq!(entries(&state), 0);
}

fn entries(directory: &Path) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}
