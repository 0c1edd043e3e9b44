//! Well-known paths in `/tmp`, at which other users of the machine may have planted files. The agent neither
//! uses nor changes these files, and continues without its own.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use actors::log::event::LogEvent;
use nix::libc::O_NONBLOCK;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use test_support::serve::ServeAgent;
use test_support::surroundings::{
    OPERATOR, STRANGER, as_user, bash_as, can_switch_user, world_writable_directory,
};
use test_support::{RUN_UNTIL_GO, RUNNING, World, base64, job, wait_until};

const KEY: &str = "ssh-ed25519 AAAA of-the-job";

/// Ways to plant a world-writable file or link at the path `$1`.
const PLANTS: [&str; 4] = [
    "echo mine > \"$1\"; chmod 666 \"$1\"",
    "echo mine > \"$1.target\"; chmod 666 \"$1.target\"; ln -s \"$1.target\" \"$1\"",
    "mkfifo \"$1\"; chmod 666 \"$1\"",
    "mkdir \"$1\"; chmod 777 \"$1\"",
];

/// Plants something at this path as the other user.
fn plant(how: &str, path: &Path) {
    bash_as(STRANGER, &format!("set -e; set -- '{}'; {how}", path.display()));
}

/// Describes the file at a path, and the target of a link.
fn look(path: &Path) -> String {
    let of = |path: &Path| {
        let Ok(found) = fs::symlink_metadata(path) else { return "nothing".to_owned() };
        let content = if found.is_file() {
            fs::read_to_string(path).unwrap()
        } else if found.is_dir() {
            format!("{} files", fs::read_dir(path).unwrap().count())
        } else if found.file_type().is_fifo() {
            let mut content = String::new();
            // Opening a pipe without a writer must not block.
            let mut fifo = File::options().read(true).custom_flags(O_NONBLOCK).open(path).unwrap();
            let _ = fifo.read_to_string(&mut content);
            content
        } else {
            fs::read_link(path).unwrap().display().to_string()
        };
        format!("{} {} {:o} {content:?}", found.ino(), found.uid(), found.mode())
    };
    [path.to_owned(), with_suffix(path, ".target")].map(|path| of(&path)).join("; ")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.to_owned().into_os_string();
    path.push(suffix);
    path.into()
}

/// A directory like `/tmp`, which holds the SSH access script.
struct Place {
    world: World,
    script: PathBuf,
    _directory: TempDir,
}

impl Place {
    fn new() -> Self {
        let directory = world_writable_directory(0);
        let script = directory.path().join("ssh_jump_point");
        Self { world: World::new(), script, _directory: directory }
    }

    /// Starts an agent whose user can't remove files of other users.
    fn start(&self) -> ServeAgent {
        ServeAgent::start_with(&self.world, |command| {
            command.arg("--ssh-jump-point-path").arg(&self.script);
            as_user(&self.world, OPERATOR, command);
        })
    }

    fn keys(&self) -> String {
        let keys = self.world.home().join(".ssh/authorized_keys");
        fs::read_to_string(keys).unwrap_or_default()
    }
}

/// Returns a job with a key, which runs until the file `go` exists.
fn job_with_key() -> Value {
    let mut request = job("1", &["id -u", RUN_UNTIL_GO]);
    request["ssh_public_keys"] = json!([base64(KEY.as_bytes())]);
    request
}

#[test]
fn no_key_is_installed_if_another_user_holds_the_scripts_path() {
    if !can_switch_user() {
        return;
    }
    for planted in PLANTS {
        println!("{planted}");
        let place = Place::new();
        plant(planted, &place.script);
        let before = look(&place.script);
        let agent = place.start();
        agent.post_job(&job_with_key()).of_status(200);
        agent.wait_for_log("1", RUNNING);
        assert!(!place.keys().contains("of-the-job"), "{}", place.keys());
        fs::write(place.world.home().join("go"), "").unwrap();
        let finished = agent.finish("1");
        assert_eq!((finished.result(), finished.commands()[0].0.as_str()), ("passed", "12345\n"));
        assert_eq!(look(&place.script), before);
        let path = place.script.display().to_string();
        let explains = |event: &LogEvent| match event {
            LogEvent::CmdOutput { output, .. } => {
                output.lines().any(|line| line.contains("SSH") && line.contains(&path))
            }
            _ => false,
        };
        assert!(finished.events.iter().any(explains), "{:?}", finished.events);
    }
}

#[test]
fn the_agent_holds_the_scripts_path_as_long_as_it_lives() {
    if !can_switch_user() {
        return;
    }
    let place = Place::new();
    let mut agent = place.start();
    let is_held = || {
        let owner = fs::symlink_metadata(&place.script).map(|found| (found.is_file(), found.uid()));
        owner.is_ok_and(|owner| owner == (true, OPERATOR))
    };
    let content = || fs::read_to_string(&place.script).unwrap_or_default();
    wait_until(is_held, || "nobody has it before the first job".into());
    assert!(!content().contains("job-"), "{}", content());

    agent.post_job(&job_with_key()).of_status(200);
    agent.wait_for_log("1", RUNNING);
    assert!(content().contains("job-"), "{}", content());
    assert!(place.keys().contains("of-the-job"), "{}", place.keys());
    fs::write(place.world.home().join("go"), "").unwrap();
    assert_eq!(agent.finish("1").result(), "passed");
    assert!(is_held() && !content().contains("job-"), "after the job: {}", look(&place.script));

    agent.signal(Signal::SIGTERM);
    assert!(agent.wait_for_exit().success());
    assert_eq!(look(&place.script), "nothing; nothing");
}

/// Starts an agent whose own log goes to this file.
fn logging_to(world: &World, path: &Path, user: Option<u32>) -> ServeAgent {
    ServeAgent::start_with(world, |command| {
        command.env("SEMAPHORE_AGENT_LOG_FILE_PATH", path);
        if let Some(user) = user {
            as_user(world, user, command);
        }
    })
}

#[test]
fn the_agents_own_log_is_not_written_to_files_of_other_users() {
    if !can_switch_user() {
        return;
    }
    // The owner of such a directory has more rights in it than other users.
    for (user, owner) in
        [(Some(OPERATOR), 0), (Some(OPERATOR), STRANGER), (None, 0), (None, STRANGER)]
    {
        for planted in PLANTS {
            println!("{user:?} in a directory of {owner}: {planted}");
            let directory = world_writable_directory(owner);
            let path = directory.path().join("agent_log");
            plant(planted, &path);
            // Keep a pipe open for reading, so that the agent could write to it.
            let pipe = File::options().read(true).write(true).custom_flags(O_NONBLOCK).open(&path);
            let before = look(&path);
            let world = World::new();
            let agent = logging_to(&world, &path, user);
            let log = agent.wait_for_own_log(&path.display().to_string());
            let warning = log.lines().find(|line| line.contains(&path.display().to_string()));
            assert!(warning.unwrap().contains(" WARN "), "{log}");
            assert_eq!(agent.run_to_end(&job("1", &["true"])).result(), "passed");
            assert_eq!(look(&path), before);
            drop(pipe);
        }
    }
}

#[test]
fn the_agents_own_log_is_created_again_when_it_is_removed() {
    let world = World::new();
    let path = world.home().with_file_name("agent_log");
    let agent = ServeAgent::start(&world);
    for number in 0..3 {
        fs::remove_file(&path).unwrap();
        agent.get(&format!("/nothing-{number}")).of_status(404);
        let line = format!("path=/nothing-{number} ");
        let is_back = || fs::read_to_string(&path).is_ok_and(|log| log.contains(&line));
        wait_until(is_back, || format!("{line}is in no file; {}", agent.own_log()));
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }
    assert!(agent.get("/agent_logs").of_status(200).text().contains("/nothing-2"));
}
