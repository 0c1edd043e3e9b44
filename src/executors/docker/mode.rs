//! Computes what `chmod MODE` does to a file's mode, for containers that do not run yet. Pure.

use actors::request::parse_octal_mode;

/// The umask that limits a clause without `u`, `g`, `o` or `a`, such as `+w`.
const USUAL_UMASK: u32 = 0o022;

/// Returns the permissions after `chmod MODE` of a file that had `before`; `None` if `mode` is invalid.
pub(super) fn after_chmod(mode: &str, before: u32) -> Option<u32> {
    parse_octal_mode(mode).or_else(|| mode.split(',').try_fold(before, after_clause))
}

/// Applies one symbolic clause, such as `ug+rw-x`.
fn after_clause(before: u32, clause: &str) -> Option<u32> {
    const OPERATORS: [char; 3] = ['+', '-', '='];
    let (who, mut changes) = clause.split_at(clause.find(OPERATORS)?);
    let named = who.chars().try_fold(0, |all, who| {
        Some(
            all | match who {
                'u' => 0o4700,
                'g' => 0o2070,
                'o' => 0o1007,
                'a' => 0o7777,
                _ => return None,
            },
        )
    })?;
    let (cleared, set) = if named == 0 { (0o7777, 0o7777 & !USUAL_UMASK) } else { (named, named) };
    let mut mode = before;
    while let Some(operator) = changes.chars().next() {
        changes = &changes[1..];
        let end = changes.find(OPERATORS).unwrap_or(changes.len());
        let bits = bits_of(&changes[..end], mode)? & set;
        changes = &changes[end..];
        mode = match operator {
            '+' => mode | bits,
            '-' => mode & !bits,
            _ => mode & !cleared | bits,
        };
    }
    Some(mode)
}

/// Returns the bits of `permissions` for user, group and others alike; the caller masks them.
fn bits_of(permissions: &str, mode: u32) -> Option<u32> {
    match permissions {
        "u" => return Some((mode >> 6 & 7) * 0o111),
        "g" => return Some((mode >> 3 & 7) * 0o111),
        "o" => return Some((mode & 7) * 0o111),
        _ => {}
    }
    permissions.chars().try_fold(0, |all, permission| {
        Some(
            all | match permission {
                'r' => 0o444,
                'w' => 0o222,
                'x' => 0o111,
                'X' if mode & 0o111 != 0 => 0o111,
                'X' => 0,
                's' => 0o6000,
                't' => 0o1000,
                _ => return None,
            },
        )
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::process::Command;

    use super::*;

    #[test]
    fn modes_are_computed_as_by_chmod() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for mode in [
            "0600",
            "644",
            "7777",
            "0",
            "u+x",
            "+x",
            "+w",
            "=r",
            "a=rX",
            "a+X",
            "u+x,a+X",
            "g=u",
            "u=rwx,g+r,o=",
            "go-rwx",
            "ug+rw-x",
            "u+s,g+s,+t",
            "o=g,g-r",
            "=",
            "u=",
            "+",
            "",
            "8",
            "17777",
            "x",
            "u",
            "u+q",
            "z+r",
            "u+x,",
            "rwxr-xr-x",
            "wrong",
            "u+ug",
        ] {
            let script = format!("umask 022; chmod 600 \"$1\" && chmod -- '{mode}' \"$1\"");
            let path = file.path().as_os_str();
            let mut chmod = Command::new("bash");
            let taken = chmod.args(["-c", &script, "-"]).arg(path).output().unwrap();
            let mode_is = file.as_file().metadata().unwrap().permissions().mode() & 0o7777;
            let expected = taken.status.success().then_some(mode_is);
            assert_eq!(after_chmod(mode, 0o600), expected, "{mode}");
        }
    }
}
