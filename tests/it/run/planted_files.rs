//! Paths in `/tmp` that everybody knows: other users of the machine may have been there first. What they have
//! put there is neither used nor changed, and the agent goes on without it.

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
    OPERATOR, STRANGER, as_user, done_by, has_other_users, open_to_all,
};
use test_support::{RUN_UNTIL_GO, RUNNING, World, base64, job, wait_until};

const KEY: &str = "ssh-ed25519 AAAA of-the-job";

/// What another user can put at a path, given as `$1`, so that everybody may write to it.
const PLANTS: [&str; 4] = [
    "echo mine > \"$1\"; chmod 666 \"$1\"",
    "echo mine > \"$1.target\"; chmod 666 \"$1.target\"; ln -s \"$1.target\" \"$1\"",
    "mkfifo \"$1\"; chmod 666 \"$1\"",
    "mkdir \"$1\"; chmod 777 \"$1\"",
];

/// Has the other user put something at this path.
fn plant(how: &str, path: &Path) {
    done_by(STRANGER, &format!("set -e; set -- '{}'; {how}", path.display()));
}

/// All that can be told of what is at a path, and of what a link there leads to.
fn look(path: &Path) -> String {
    let of = |path: &Path| {
        let Ok(found) = fs::symlink_metadata(path) else { return "nothing".to_owned() };
        let content = if found.is_file() {
            fs::read_to_string(path).unwrap()
        } else if found.is_dir() {
            format!("{} files", fs::read_dir(path).unwrap().count())
        } else if found.file_type().is_fifo() {
            let mut content = String::new();
            // Nothing comes if nobody has it open.
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

/// A place like `/tmp`, where the script for people who log in is to be.
struct Place {
    world: World,
    script: PathBuf,
    _directory: TempDir,
}

impl Place {
    fn new() -> Self {
        let directory = open_to_all(0);
        let script = directory.path().join("ssh_jump_point");
        Self { world: World::new(), script, _directory: directory }
    }

    /// An agent of a user who can't remove what is another's.
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

/// A job with a key that runs until it may end.
fn job_with_key() -> Value {
    let mut request = job("1", &["id -u", RUN_UNTIL_GO]);
    request["ssh_public_keys"] = json!([base64(KEY.as_bytes())]);
    request
}

#[test]
fn no_key_opens_where_somebody_else_has_the_place_of_the_script() {
    if !has_other_users() {
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
        let tells = |event: &LogEvent| match event {
            LogEvent::CmdOutput { output, .. } => {
                output.lines().any(|line| line.contains("SSH") && line.contains(&path))
            }
            _ => false,
        };
        assert!(finished.events.iter().any(tells), "{:?}", finished.events);
    }
}

#[test]
fn the_place_of_the_script_is_the_agents_as_long_as_it_lives() {
    if !has_other_users() {
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

/// An agent whose own log is to be in this file.
fn logging_to(world: &World, path: &Path, user: Option<u32>) -> ServeAgent {
    ServeAgent::start_with(world, |command| {
        command.env("SEMAPHORE_AGENT_LOG_FILE_PATH", path);
        if let Some(user) = user {
            as_user(world, user, command);
        }
    })
}

#[test]
fn the_agents_own_log_is_not_written_to_what_somebody_else_owns() {
    if !has_other_users() {
        return;
    }
    // Who owns such a directory can do more there than others.
    for (user, owner) in
        [(Some(OPERATOR), 0), (Some(OPERATOR), STRANGER), (None, 0), (None, STRANGER)]
    {
        for planted in PLANTS {
            println!("{user:?} in a directory of {owner}: {planted}");
            let directory = open_to_all(owner);
            let path = directory.path().join("agent_log");
            plant(planted, &path);
            // Open as a pipe's other end, so that what is written comes to it.
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
fn the_agents_own_log_comes_back_when_it_is_removed() {
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
