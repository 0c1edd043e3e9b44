//! Writes a job's files on this machine.
//!
//! The files are often keys, and the agent may be root. So no other user may be able to redirect them with a
//! link, or to have the target file open already.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{File, Permissions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};

/// How many symbolic links are followed on the way to one file, as in the kernel.
const MOST_LINKS: u32 = 40;

/// Writes `content` to `path`, an absolute path, with `mode`.
///
/// Missing directories are created. Links are followed if they belong to root or to this user. An existing
/// regular file is replaced, and so is another user's link; anything else at `path` is an error.
pub(super) fn inject(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let (directory, name) = find(path)?;
    let mut file = replace(&directory, &name)?;
    // Set the mode before the content is written, and again after, as writing clears set-id bits.
    file.set_permissions(Permissions::from_mode(mode))?;
    file.write_all(content)?;
    file.set_permissions(Permissions::from_mode(mode))
}

/// Resolves `path`, creating missing directories. Returns the directory of the file, and its name there.
fn find(path: &Path) -> io::Result<(OwnedFd, OsString)> {
    let mut ahead: VecDeque<OsString> = names_of(path).collect();
    let mut behind = vec![root()?];
    let mut links = 0;
    while let Some(name) = ahead.pop_front() {
        let Some(directory) = behind.last() else {
            behind.push(root()?);
            ahead.push_front(name);
            continue;
        };
        if name == ".." {
            // The parent of the root is the root, which the next name opens again.
            behind.pop();
            continue;
        }
        let found = stat(directory, &name)?;
        if found.is_some_and(|found| kind(&found) == SFlag::S_IFLNK) {
            if !found.is_some_and(|found| is_trusted(&found)) {
                if ahead.is_empty() {
                    return Ok((behind.pop().ok_or(Errno::ENOENT)?, name));
                }
                let link = Path::new(&name).display().to_string();
                return Err(refused(&format!(
                    "the link `{link}` in the path belongs to another user"
                )));
            }
            links += 1;
            if links > MOST_LINKS {
                return Err(Errno::ELOOP.into());
            }
            let target = readlinkat(directory, name.as_os_str())?;
            if Path::new(&target).is_absolute() {
                behind.clear();
            }
            names_of(Path::new(&target)).rev().for_each(|name| ahead.push_front(name));
            continue;
        }
        if ahead.is_empty() {
            return Ok((behind.pop().ok_or(Errno::ENOENT)?, name));
        }
        if found.is_none() {
            match mkdirat(directory, name.as_os_str(), Mode::from_bits_truncate(0o777)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let next = openat(directory, name.as_os_str(), DIRECTORY, Mode::empty())?;
        behind.push(next);
    }
    Err(refused("is not the path of a file"))
}

const DIRECTORY: OFlag =
    OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

fn root() -> io::Result<OwnedFd> {
    Ok(open("/", DIRECTORY, Mode::empty())?)
}

/// Returns the components of `path`, `..` included, without `/` and `.`.
fn names_of(path: &Path) -> impl DoubleEndedIterator<Item = OsString> {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    })
}

fn stat(directory: &OwnedFd, name: &OsString) -> io::Result<Option<FileStat>> {
    match fstatat(directory.as_fd(), name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::ENOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn kind(found: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT
}

fn is_trusted(found: &FileStat) -> bool {
    found.st_uid == 0 || found.st_uid == geteuid().as_raw()
}

fn refused(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

/// Opens the file for writing, empty. It is a new file, which nobody else can have open, if the old one can
/// be removed; else the old one, if it belongs to this user.
fn replace(directory: &OwnedFd, name: &OsString) -> io::Result<File> {
    let found = stat(directory, name)?;
    if let Some(found) = &found {
        if ![SFlag::S_IFREG, SFlag::S_IFLNK].contains(&kind(found)) {
            return Err(refused("is not a regular file"));
        }
        match unlinkat(directory, name.as_os_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            // The file is a mount point, or its directory is not writable.
            Err(_) if kind(found) == SFlag::S_IFREG && found.st_uid == geteuid().as_raw() => {
                let flags =
                    OFlag::O_WRONLY | OFlag::O_TRUNC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
                let file =
                    openat(directory, name.as_os_str(), flags | OFlag::O_CLOEXEC, Mode::empty())?;
                return Ok(File::from(file));
            }
            Err(error) => return Err(error.into()),
        }
    }
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
    let mode = Mode::from_bits_truncate(0o600);
    Ok(File::from(openat(directory, name.as_os_str(), flags | OFlag::O_CLOEXEC, mode)?))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, symlink};

    use super::*;

    #[test]
    fn directories_are_created_and_own_links_followed() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir(at("real")).unwrap();
        symlink("real", at("link")).unwrap();
        symlink(at("link/../link/deep/file"), at("far")).unwrap();
        inject(&at("link/deep/file"), b"one", 0o640).unwrap();
        assert_eq!(fs::read(at("real/deep/file")).unwrap(), b"one");
        inject(&at("far"), b"two", 0o400).unwrap();
        let found = fs::metadata(at("real/deep/file")).unwrap();
        assert_eq!((fs::read(at("far")).unwrap(), found.mode() & 0o7777), (b"two".into(), 0o400));
        symlink("around", at("around")).unwrap();
        for bad in ["around", "around/x", "real", "real/deep/file/x"] {
            assert!(inject(&at(bad), b"", 0o600).is_err(), "{bad}");
        }
    }

    #[test]
    fn new_content_does_not_appear_in_the_old_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        fs::write(&path, "old").unwrap();
        fs::hard_link(&path, directory.path().join("other")).unwrap();
        inject(&path, b"new", 0o600).unwrap();
        assert_eq!(fs::read(directory.path().join("other")).unwrap(), b"old");
        assert_eq!(fs::read(path).unwrap(), b"new");
    }
}
