//! Writes a job's files into side containers that do not run yet, as archives through the engine.

use std::path::{Path, PathBuf};

use actors::errors::Cause;
use actors::job::InjectedFile;
use actors::ports::StepError;
use bollard::errors::Error;
use bollard::query_parameters::{
    ContainerArchiveInfoOptions, DownloadFromContainerOptions, UploadToContainerOptions,
};
use bytes::Bytes;
use futures_util::StreamExt as _;

use super::engine::Engine;
use super::errors::RequestError;
use super::mode::after_chmod;
use crate::executors::home_path;

/// The largest `/etc/passwd` and `/etc/group` of an image that are read, in bytes.
const LARGEST_PASSWD: usize = 4 << 20;

/// The mode that a relative mode such as `+x` is applied to, and that of created directories.
const FIRST_MODE: u32 = 0o600;
const DIRECTORY_MODE: u32 = 0o755;

/// The user that a container runs as, who owns the files injected into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerUser {
    /// The numeric user id.
    pub uid: u64,
    /// The numeric group id.
    pub gid: u64,
    /// The home directory, which relative paths are resolved against.
    pub home: PathBuf,
}

impl ContainerUser {
    /// Looks up `user` (`NAME`, `NUMBER`, or either with `:GROUP`) in the container's `/etc/passwd` and
    /// `/etc/group`. An unknown user has the home `/`.
    pub async fn look_up(engine: &Engine, container: &str, user: &str) -> Self {
        let file = async |path| {
            let content = download(engine, container, path).await.unwrap_or_default();
            String::from_utf8_lossy(&content).into_owned()
        };
        let groups = if user.contains(':') { file("/etc/group").await } else { String::new() };
        Self::find(user, &file("/etc/passwd").await, &groups)
    }

    fn find(user: &str, passwd: &str, groups: &str) -> Self {
        let (name, group) = user.split_once(':').unwrap_or((user, ""));
        let name = if name.is_empty() { "0" } else { name };
        let entry = passwd.lines().find_map(|line| {
            let fields: Vec<_> = line.split(':').collect();
            let [its, _, uid, gid, _, home, ..] = fields[..] else {
                return None;
            };
            (its == name || uid == name).then_some((uid, gid, home))
        });
        let (uid, gid, home) = entry.unwrap_or((name, "0", "/"));
        let number = |text: &str| text.parse().unwrap_or(0);
        let group_of = |line: &str| {
            let mut fields = line.split(':');
            let is_it = fields.next() == Some(group);
            fields.nth(1).filter(|_| is_it).and_then(|gid| gid.parse().ok())
        };
        let named = || groups.lines().find_map(group_of);
        let gid = group.parse().ok().or_else(named).unwrap_or(number(gid));
        Self { uid: number(uid), gid, home: home.into() }
    }

    /// Writes `file` into `container`, and creates missing parent directories.
    pub async fn upload(
        &self,
        engine: &Engine,
        container: &str,
        file: &InjectedFile,
    ) -> Result<(), StepError> {
        let path = home_path::resolve(&self.home, &file.path);
        let failed = |cause: Cause| StepError::of(path.display().to_string(), cause);
        let mode = after_chmod(&file.mode, FIRST_MODE).ok_or_else(|| {
            let (mode, path) = (&file.mode, path.display());
            StepError::new(format!("Failed to set file mode to {mode}\n{path}: invalid mode"))
        })?;
        let missing = missing_directories(engine, container, &path).await;
        let archive = self.archive(&missing, &path, &file.content, mode);
        let archive = archive.map_err(|error| failed(error.into()))?;
        let options = UploadToContainerOptions {
            path: "/".to_owned(),
            no_overwrite_dir_non_dir: Some("true".to_owned()),
            ..Default::default()
        };
        let body = bollard::body_full(archive);
        let uploaded = engine.api.upload_to_container(container, Some(options), body).await;
        uploaded.map_err(|error| failed(RequestError::from(error).into()))
    }

    fn archive(
        &self,
        directories: &[PathBuf],
        path: &Path,
        content: &[u8],
        mode: u32,
    ) -> std::io::Result<Bytes> {
        let mut archive = tar::Builder::new(Vec::new());
        for directory in directories {
            let mut header = self.header(tar::EntryType::Directory, DIRECTORY_MODE);
            archive.append_data(&mut header, relative(directory), &[][..])?;
        }
        let mut header = self.header(tar::EntryType::Regular, mode);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, relative(path), content)?;
        archive.into_inner().map(Bytes::from)
    }

    fn header(&self, kind: tar::EntryType, mode: u32) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        header.set_mode(mode);
        header.set_uid(self.uid);
        header.set_gid(self.gid);
        header
    }
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

/// Returns the missing parent directories of `path`, the uppermost first. The archive must contain them: the
/// engine creates all others as root's.
async fn missing_directories(engine: &Engine, container: &str, path: &Path) -> Vec<PathBuf> {
    let mut missing = Vec::new();
    for directory in path.ancestors().skip(1).filter(|directory| directory.parent().is_some()) {
        let options = ContainerArchiveInfoOptions { path: directory.display().to_string() };
        let found = engine.api.get_container_archive_info(container, Some(options)).await;
        if !matches!(found, Err(Error::DockerResponseServerError { status_code: 404, .. })) {
            break;
        }
        missing.push(directory.to_owned());
    }
    missing.reverse();
    missing
}

/// Returns the content of the file at `path` in `container`; `None` if it can't be read or is larger than
/// [`LARGEST_PASSWD`].
async fn download(engine: &Engine, container: &str, path: &str) -> Option<Vec<u8>> {
    let options = DownloadFromContainerOptions { path: path.to_owned() };
    let mut parts = Box::pin(engine.api.download_from_container(container, Some(options)));
    let mut archive = Vec::new();
    while let Some(part) = parts.next().await {
        archive.extend_from_slice(&part.ok()?);
        if archive.len() > LARGEST_PASSWD {
            return None;
        }
    }
    let mut archive = tar::Archive::new(&archive[..]);
    let mut content = Vec::new();
    let mut entry = archive.entries().ok()?.next()?.ok()?;
    std::io::Read::read_to_end(&mut entry, &mut content).ok()?;
    Some(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\ndev:x:1000:100::/home/dev:/bin/bash\nbad\n";

    const GROUPS: &str = "root:x:0:\nstaff:x:50:dev\nbad\n";

    #[test]
    fn users_are_looked_up_by_name_or_number() {
        let of = |user| {
            let ContainerUser { uid, gid, home } = ContainerUser::find(user, PASSWD, GROUPS);
            (uid, gid, home.display().to_string())
        };
        assert_eq!(of(""), (0, 0, "/root".into()));
        assert_eq!(of("dev"), (1000, 100, "/home/dev".into()));
        assert_eq!(of("1000:5"), (1000, 5, "/home/dev".into()));
        assert_eq!(of("7"), (7, 0, "/".into()));
        assert_eq!(of("dev:staff"), (1000, 50, "/home/dev".into()));
        assert_eq!(of("dev:unknown"), (1000, 100, "/home/dev".into()));
    }

    #[test]
    fn an_archive_has_owner_mode_and_content() {
        let user = ContainerUser::find("dev", PASSWD, GROUPS);
        let path = PathBuf::from("/home/dev/new/key");
        let archive = user.archive(&["/home/dev/new".into()], &path, b"secret", 0o640).unwrap();
        let mut archive = tar::Archive::new(&archive[..]);
        let mut seen = Vec::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let header = entry.header();
            let owner = (header.uid().unwrap(), header.gid().unwrap());
            assert_eq!(owner, (1000, 100));
            let mode = header.mode().unwrap();
            let path = entry.path().unwrap().display().to_string();
            let mut content = String::new();
            std::io::Read::read_to_string(&mut entry, &mut content).unwrap();
            seen.push((path, mode, content));
        }
        let directory = ("home/dev/new".to_owned(), 0o755, String::new());
        assert_eq!(seen, [directory, ("home/dev/new/key".to_owned(), 0o640, "secret".to_owned())]);
    }
}
