//! Paths of a job's files.

use std::path::{Component, Path, PathBuf};

/// Resolves `path` against `home`, an absolute path: `~/…` and relative paths lie below it. Removes `.` and `..`
/// without looking at the file system.
pub(super) fn resolve(home: &Path, path: &str) -> PathBuf {
    let mut resolved = PathBuf::from("/");
    for part in home.join(path.strip_prefix("~/").unwrap_or(path)).components() {
        match part {
            Component::ParentDir => drop(resolved.pop()),
            Component::Normal(part) => resolved.push(part),
            Component::Prefix(_) | Component::RootDir | Component::CurDir => {}
        }
    }
    resolved
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_lie_below_the_home_directory_unless_they_are_absolute() {
        let cases = [
            ("~/.ssh/id", "/home/me/.ssh/id"),
            ("a/b", "/home/me/a/b"),
            ("./a/./b", "/home/me/a/b"),
            ("/etc/x", "/etc/x"),
            ("../you/x", "/home/you/x"),
            ("../../../../x", "/x"),
            ("/a//b/../c", "/a/c"),
            ("~/../..", "/"),
            ("~you/x", "/home/me/~you/x"),
        ];
        for (path, expected) in cases {
            assert_eq!(resolve(Path::new("/home/me"), path), Path::new(expected), "{path}");
        }
    }
}
