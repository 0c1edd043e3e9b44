//! Quotes text for a shell.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

/// Returns `text` as one word of a shell. Bytes that are not UTF-8 are replaced.
pub fn quoted(text: impl AsRef<OsStr>) -> String {
    let mut word = Vec::new();
    push_quoted(&mut word, text.as_ref().as_bytes());
    String::from_utf8_lossy(&word).into_owned()
}

/// Appends `value` to `script` as one word of a shell, byte for byte.
pub fn push_quoted(script: &mut Vec<u8>, value: &[u8]) {
    script.push(b'\'');
    for (index, part) in value.split(|byte| *byte == b'\'').enumerate() {
        if index > 0 {
            script.extend_from_slice(br"'\''");
        }
        script.extend_from_slice(part);
    }
    script.push(b'\'');
}
