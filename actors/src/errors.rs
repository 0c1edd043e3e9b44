//! The causes of errors, and how an error is shown with them.

use std::error::Error;
use std::fmt;

/// The cause of an error, of a type that only the implementation of a port knows.
pub type Cause = Box<dyn Error + Send + Sync>;

/// Shows an error and, behind a colon each, its causes: `PATH: can't be read: permission denied`.
///
/// Errors keep their causes as [`Error::source`], not in their own text. They are shown whole where they
/// leave the program: in a log, an answer of the API, or on the terminal. Libraries do not all keep to
/// that, so a cause is left out if the text before it contains it already.
#[derive(Debug)]
pub struct WithCauses<'a>(pub &'a (dyn Error + 'a));

impl fmt::Display for WithCauses<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = self.0.to_string();
        let mut error = self.0;
        while let Some(cause) = error.source() {
            let text = cause.to_string();
            if !shown.contains(&text) {
                shown.push_str(": ");
                shown.push_str(&text);
            }
            error = cause;
        }
        f.write_str(&shown)
    }
}

/// An error of one object, such as a file, an image or a container: `PATH: permission denied`.
#[derive(Debug, thiserror::Error)]
#[error("{object}")]
pub struct ErrorOf {
    object: String,
    source: Cause,
}

impl ErrorOf {
    /// Creates the error of `object` from its cause, or from a text.
    pub fn new(object: impl Into<String>, source: impl Into<Cause>) -> Self {
        Self { object: object.into(), source: source.into() }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn an_error_is_shown_with_all_its_causes() {
        let refused = || io::Error::from(io::ErrorKind::PermissionDenied);
        let alone = refused();
        assert_eq!(WithCauses(&alone).to_string(), "permission denied");
        let error = ErrorOf::new("/a", refused());
        assert_eq!(WithCauses(&error).to_string(), "/a: permission denied");
        let repeating = ErrorOf::new("/a: permission denied", refused());
        assert_eq!(WithCauses(&repeating).to_string(), "/a: permission denied");
        let outer = ErrorOf::new("file 1", io::Error::other(error));
        assert_eq!(WithCauses(&outer).to_string(), "file 1: /a: permission denied");
    }
}
