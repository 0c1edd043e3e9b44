use std::fs;

use super::*;

struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("job-1")).unwrap();
        fs::create_dir(directory.path().join("job-2")).unwrap();
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn access(&self, job: &str) -> SshAccess {
        SshAccess {
            home: self.directory.path().to_owned(),
            script: self.path("jump"),
            job_directory: self.path(job),
            without_keys: true,
            leads_to: LeadsTo::Shell { environment: Some(self.path(job).join("environment")) },
        }
    }

    fn read(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.path(name)).ok()
    }
}

const KEY: Bytes = Bytes::from_static(b"ssh-ed25519 AAAA me@home\n");

#[test]
fn a_key_that_is_not_utf8_is_removed() {
    let place = Place::new();
    let access = place.access("job-1");
    access.open_now(&[Bytes::from_static(b"ssh-ed25519 AAAA J\xfcrgen\n")]).unwrap();
    assert!(fs::read(place.path(".ssh/authorized_keys")).unwrap().contains(&0xfc));
    access.close_now().unwrap();
    assert_eq!(place.read(".ssh/authorized_keys"), None);
}

#[test]
fn keys_are_removed_even_if_another_program_holds_the_lock() {
    let place = Place::new();
    let access = place.access("job-1");
    access.open_now(&[KEY]).unwrap();
    let home = File::open(place.path("")).unwrap();
    home.lock().unwrap();
    access.close_now().unwrap();
    assert_eq!(place.read(".ssh/authorized_keys"), None);
}

#[test]
fn a_huge_file_is_not_read() {
    let place = Place::new();
    let huge = File::create(place.path("jump")).unwrap();
    huge.set_len(1 << 40).unwrap();
    let access = place.access("job-1");
    assert!(access.close_now().unwrap_err().to_string().contains("too large"));
    access.open_now(&[KEY]).unwrap();
    access.close_now().unwrap();
    assert_eq!(place.read("jump").as_deref(), Some(NO_JOB));
}

#[test]
fn exactly_the_added_lines_are_removed() {
    for before in [None, Some(""), Some("ssh-rsa BBBB"), Some("ssh-rsa BBBB\n# x\n")] {
        let place = Place::new();
        if let Some(before) = before {
            fs::create_dir(place.path(".ssh")).unwrap();
            fs::write(place.path(".ssh/authorized_keys"), before).unwrap();
            fs::write(place.path(".bash_profile"), before).unwrap();
        }
        let [one, two] = ["job-1", "job-2"].map(|job| place.access(job));
        one.open_now(&[KEY]).unwrap();
        two.open_now(&[KEY]).unwrap();
        let keys = place.read(".ssh/authorized_keys").unwrap();
        assert_eq!(keys.matches("ssh-ed25519 AAAA me@home semaphore-agent:/").count(), 2);
        one.close_now().unwrap();
        assert!(place.read("jump").unwrap().contains("job-2"), "the other job's script stays");
        two.close_now().unwrap();
        two.close_now().unwrap();
        assert_eq!(place.read(".ssh/authorized_keys").as_deref(), before);
        assert_eq!(place.read(".bash_profile").as_deref(), before);
        assert_eq!(place.read("jump").as_deref(), Some(NO_JOB));
    }
}

#[test]
fn links_are_not_followed() {
    let place = Place::new();
    fs::write(place.path("victim"), "mine").unwrap();
    fs::create_dir(place.path(".ssh")).unwrap();
    for link in [".ssh/authorized_keys", ".bash_profile", "jump"] {
        std::os::unix::fs::symlink(place.path("victim"), place.path(link)).unwrap();
    }
    let access = place.access("job-1");
    assert!(access.open_now(&[KEY]).unwrap_err().to_string().starts_with("the keys: "));
    assert!(place.read("jump").unwrap().contains("exec"), "the link was replaced");
    // The other two links still exist, and closing must not follow them either.
    access.close_now().unwrap();
    assert_eq!(place.read("jump").as_deref(), Some(NO_JOB));
    assert_eq!(place.read("victim").as_deref(), Some("mine"));
}

#[test]
fn a_symbolic_link_at_the_ssh_directory_is_refused() {
    let place = Place::new();
    fs::create_dir(place.path("elsewhere")).unwrap();
    std::os::unix::fs::symlink(place.path("elsewhere"), place.path(".ssh")).unwrap();
    assert!(place.access("job-1").open_now(&[KEY]).is_err());
    assert_eq!(fs::read_dir(place.path("elsewhere")).unwrap().count(), 0);
}

#[test]
fn ssh_access_of_dead_jobs_is_removed() {
    let place = Place::new();
    let [dead, alive] = ["job-1", "job-2"].map(|job| place.access(job));
    dead.open_now(&[KEY]).unwrap();
    alive.open_now(&[KEY]).unwrap();
    fs::remove_dir_all(place.path("job-1")).unwrap();
    SshAccess::claim(&dead.home, &dead.script).unwrap();
    let keys = place.read(".ssh/authorized_keys").unwrap();
    assert!(keys.contains("job-2") && !keys.contains("job-1"), "{keys}");
}
