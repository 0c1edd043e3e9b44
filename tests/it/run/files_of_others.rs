//! Files of a job are often keys. If another user has planted something at a file's path, that user can't
//! read the job's file, and the agent does not write to the planted target.

use std::fs::{self, File, Permissions};
use std::io::{Read as _, Seek as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::libc::O_NONBLOCK;
use serde_json::{Value, json};

use test_support::docker::file;
use test_support::surroundings::{
    OPERATOR, STRANGER, as_user, bash_as, can_switch_user, world_writable_directory,
};
use test_support::{Finished, World, job_of, wait_for_end};

/// The content of the job's file.
const CONTENT: &str = "private key";

/// Ways to plant something in a world-writable directory at the path of a job's file (`keys/deploy.pem` or
/// `deploy.pem`): the script of the other user, and the path of the job's file.
const PLANTS: [(&str, &str); 6] = [
    // A file that everybody may write.
    ("echo mine > deploy.pem; chmod 666 deploy.pem", "deploy.pem"),
    // A file in a directory of the other user, with or without write permission for all.
    ("mkdir keys; echo mine > keys/deploy.pem; chmod 666 keys/deploy.pem", "keys/deploy.pem"),
    (
        "mkdir keys; chmod 1777 keys; echo mine > keys/deploy.pem; chmod 666 keys/deploy.pem",
        "keys/deploy.pem",
    ),
    // A link to a file of the other user.
    ("echo mine > target; chmod 666 target; ln -s target deploy.pem", "deploy.pem"),
    // A dangling link.
    ("mkdir theirs; chmod 777 theirs; ln -s theirs/target deploy.pem", "deploy.pem"),
    // A pipe that the other user has opened.
    ("mkfifo deploy.pem; chmod 666 deploy.pem", "deploy.pem"),
];

/// Returns a job that prints a file that came with it.
fn job_with(path: &Path) -> Value {
    let show = format!("cat '{}'", path.display());
    let mut job: Value = serde_json::from_str(&job_of(&[&show])).unwrap();
    job["files"] = json!([file(path.to_str().unwrap(), CONTENT.as_bytes(), "0600")]);
    job
}

/// Runs a job with an agent of this user.
fn run_as(world: &World, user: u32, job: &Value) -> Finished {
    let file = world.file("job.json", job.to_string());
    let mut agent = world.agent();
    agent.args(["run", "--output", "json"]).arg(file);
    if user != 0 {
        as_user(world, user, &mut agent);
    }
    let child = agent.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    Finished::of(&wait_for_end(child))
}

/// Asserts that the file is as requested, or that it is missing and the log names it.
fn assert_safe_or_refused(finished: &Finished, path: &Path, user: u32, planted: &str) {
    if finished.result() == "passed" {
        assert_eq!(finished.output(), CONTENT, "{planted}");
        let found = fs::symlink_metadata(path).unwrap();
        let is = (found.is_file(), found.uid(), found.mode() & 0o7777);
        assert_eq!(is, (true, user, 0o600), "{planted}: a file, its owner, its mode");
        return;
    }
    let path = path.display().to_string();
    let steps = finished.steps();
    let (_, output, code) = steps.iter().find(|(title, ..)| title == "Injecting Files").unwrap();
    let mut lines = output.lines().filter(|line| !line.starts_with("Injecting "));
    assert!(lines.any(|line| line.contains(&path)), "{planted}: {output}");
    assert_ne!(*code, 0, "{planted}");
}

#[test]
fn a_user_who_planted_a_file_can_not_read_the_jobs_file() {
    if !can_switch_user() {
        return;
    }
    for user in [0, OPERATOR] {
        for (planted, path) in PLANTS {
            println!("user {user}: {planted}");
            let directory = world_writable_directory(0);
            let go_there = format!("cd '{}'; umask 022", directory.path().display());
            bash_as(STRANGER, &format!("set -e; {go_there}; {planted}"));
            let path = directory.path().join(path);
            // Open the planted file before the job runs. A pipe is opened for both directions, as a reader
            // would block.
            let mut options = File::options();
            let is_file = fs::metadata(&path).is_ok_and(|found| found.is_file());
            options.read(true).write(!is_file).custom_flags(O_NONBLOCK);
            let mut open_before = options.open(&path).ok();

            let world = World::new();
            let finished = run_as(&world, user, &job_with(&path));
            assert_safe_or_refused(&finished, &path, user, planted);
            let search =
                "shopt -s nullglob; for file in * */*; do [[ ! -f $file ]] || cat \"$file\"; done";
            let search = format!("{go_there}; {search} 2>/dev/null; true");
            let seen = bash_as(STRANGER, &search);
            assert!(!seen.contains(CONTENT), "{planted}: {seen}");
            let mut seen = Vec::new();
            if let Some(open_before) = &mut open_before {
                let _ = open_before.rewind();
                // Reading an empty pipe fails with `WouldBlock`.
                let _ = open_before.read_to_end(&mut seen);
            }
            let seen = String::from_utf8_lossy(&seen).into_owned();
            assert!(!seen.contains(CONTENT), "{planted}: in a file opened before: {seen}");
        }
    }
}

#[test]
fn the_target_of_a_planted_link_is_not_changed() {
    if !can_switch_user() {
        return;
    }
    for user in [0, OPERATOR] {
        let directory = world_writable_directory(0);
        let world = World::new();
        let victims = world.home().join("victims");
        fs::create_dir(&victims).unwrap();
        let victim = victims.join("victim");
        fs::write(&victim, "mine\n").unwrap();
        let plant = format!(
            "set -e; cd '{}'; ln -s '{}' file; ln -s '{}' directory",
            directory.path().display(),
            victim.display(),
            victims.display(),
        );
        bash_as(STRANGER, &plant);
        for name in ["file", "directory/new", "directory/victim"] {
            let path: PathBuf = directory.path().join(name);
            let finished = run_as(&world, user, &job_with(&path));
            assert_safe_or_refused(&finished, &path, user, name);
            assert_eq!(fs::read_to_string(&victim).unwrap(), "mine\n", "user {user}: {name}");
            assert_eq!(fs::read_dir(&victims).unwrap().count(), 1, "user {user}: {name}");
        }
    }
}

#[test]
fn files_and_links_of_the_agents_own_user_are_followed() {
    let world = World::new();
    let home = world.home();
    fs::create_dir_all(home.join("there/below")).unwrap();
    symlink("there", home.join("link")).unwrap();
    for (path, mode) in [("open", 0o666), ("locked", 0o400), ("there/old", 0o600)] {
        fs::write(home.join(path), "a longer text than that of the job\n").unwrap();
        fs::set_permissions(home.join(path), Permissions::from_mode(mode)).unwrap();
    }
    // Also in a directory like /tmp, if the existing file belongs to the agent's user.
    let temporary = world_writable_directory(nix::unistd::geteuid().as_raw());
    fs::write(temporary.path().join("own"), "old\n").unwrap();
    let own = temporary.path().join("own");
    let names = ["open", "locked", "link/new", "link/old", "link/below/deep/new", "new"];
    let paths = names.map(|name| home.join(name)).into_iter().chain([own]);
    for path in paths {
        let finished = world.run(&job_with(&path).to_string());
        assert_eq!(finished.result(), "passed", "{}: {finished:?}", path.display());
        assert_eq!(finished.output(), CONTENT);
        assert_eq!(fs::read_to_string(&path).unwrap(), CONTENT);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    }
    assert_eq!(fs::read_to_string(home.join("there/old")).unwrap(), CONTENT);
    assert!(home.join("link").is_symlink());
}
