//! SSH access to jobs, with a real client and a real server; all of it is removed afterwards.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use test_support::serve::ServeAgent;
use test_support::ssh::{SshServer, client, key};
use test_support::{
    RUN_FOR_EVER, RUN_UNTIL_GO, RUNNING, World, base64, feed, job, processes_with, wait_for_end,
    wait_until,
};

const WARNING: &str = "SSH access to this job is incomplete";

/// The exit code of ssh when it can't log in.
const REFUSED: Option<i32> = Some(255);

/// A machine with an agent and an SSH server, and a key for it.
pub struct Machine {
    // Fields are dropped in this order: the programs must end before their files are deleted.
    pub agent: ServeAgent,
    server: SshServer,
    pub world: World,
    pub key: PathBuf,
}

impl Machine {
    fn start() -> Self {
        Self::start_with(|_, _| {})
    }

    /// Starts a machine after `adapt` has changed the agent's command.
    pub fn start_with(adapt: impl FnOnce(&World, &mut Command)) -> Self {
        let world = World::new();
        let directory = world.home().with_file_name("ssh");
        fs::create_dir(&directory).unwrap();
        let authorized_keys = world.home().join(".ssh/authorized_keys");
        let home = world.home();
        let environment = [("HOME", home.to_str().unwrap())];
        Self {
            agent: ServeAgent::start_with(&world, |command| adapt(&world, command)),
            server: SshServer::start(&directory, &authorized_keys, &environment),
            key: key(&directory, "me", &["-t", "ed25519"]),
            world,
        }
    }

    pub fn port(&self) -> u16 {
        self.server.port()
    }

    fn public_key(&self) -> Vec<u8> {
        fs::read(self.key.with_extension("pub")).unwrap()
    }

    /// Returns a job with a secret variable and the key.
    pub fn job(&self, commands: &[&str]) -> Value {
        let mut job = job("1", commands);
        job["env_vars"] = json!([{ "name": "GREETING", "value": base64(b"hello  world") }]);
        job["ssh_public_keys"] = json!([base64(&self.public_key())]);
        job
    }

    fn start_job(&self, job: &Value) {
        self.agent.post_job(job).of_status(200);
        self.agent.wait_for_log("1", RUNNING);
    }

    pub fn end_job(&self) {
        fs::write(self.world.home().join("go"), "").unwrap();
        assert_eq!(self.agent.finish("1").result(), "passed");
        fs::remove_file(self.world.home().join("go")).unwrap();
    }

    /// Logs in with the key, without a terminal.
    pub fn ssh(&self, command: &str) -> Output {
        self.ssh_with(&self.key, command)
    }

    fn ssh_with(&self, key: &Path, command: &str) -> Output {
        let mut ssh = client(self.server.port(), key);
        wait_for_end(ssh.args(["127.0.0.1", command]).spawn().unwrap())
    }

    /// Logs in on a terminal and types.
    pub fn type_into(&self, arguments: &[&str], typed: &str) -> Output {
        let mut ssh = client(self.server.port(), &self.key);
        ssh.args(["-tt", "127.0.0.1"]).args(arguments).stdin(Stdio::piped());
        let mut ssh = ssh.spawn().unwrap();
        feed(&mut ssh, typed.as_bytes());
        wait_for_end(ssh)
    }
}

/// Returns whether the script is the agent's placeholder, which enters no job.
pub fn is_placeholder(world: &World) -> bool {
    fs::read_to_string(script(world))
        .unwrap()
        .ends_with("echo 'No job runs here now.' >&2\nexit 1\n")
}

/// Returns the path of the script that [`ServeAgent`] configures.
pub fn script(world: &World) -> PathBuf {
    world.home().with_file_name("ssh_jump_point")
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

pub fn text(output: &Output) -> (String, Option<i32>) {
    (String::from_utf8_lossy(&output.stdout).into_owned(), output.status.code())
}

#[test]
#[cfg_attr(not(has_ssh), ignore = "needs sshd, ssh, ssh-keygen and git")]
fn a_command_gets_its_arguments_and_returns_its_exit_code() {
    let machine = Machine::start();
    machine.start_job(&machine.job(&[RUN_UNTIL_GO]));
    let script = script(&machine.world);
    let command = |rest: &str| format!("bash {} {rest}", script.display());
    for (rest, printed, code) in [
        (r"printf '<%s>' a 'b  c' '' '*' '$HOME'", "<a><b  c><><*><$HOME>", 0),
        (r#"bash -c 'echo "$GREETING"; exit 7'"#, "hello  world\n", 7),
        ("cat", "", 0),
        ("false", "", 1),
        ("no-such-command", "", 127),
        ("/etc/passwd", "", 126),
    ] {
        let answer = machine.ssh(&command(rest));
        assert_eq!(text(&answer), (printed.into(), Some(code)), "{rest}: {answer:?}");
    }
    machine.end_job();
}

#[test]
#[cfg_attr(not(has_ssh), ignore = "needs sshd, ssh, ssh-keygen and git")]
fn a_login_on_a_terminal_sees_the_job_and_the_users_own_profile() {
    let machine = Machine::start();
    let home = machine.world.home();
    fs::write(home.join(".profile"), "OF_PROFILE='my own'\n").unwrap();
    machine.start_job(&machine.job(&["export LATER=not-seen", RUN_UNTIL_GO]));
    let jump_point = format!("bash {}", script(&machine.world).display());
    let typed = "tty > /dev/null && echo \"<$GREETING, $OF_PROFILE>\"; shopt -q login_shell && \
                 echo [login]; exit 3\n";
    for arguments in [&[][..], &[jump_point.as_str()]] {
        let (printed, code) = text(&machine.type_into(arguments, typed));
        for expected in ["<hello  world, my own>", "\n[login]"] {
            assert!(printed.contains(expected), "{arguments:?}: {printed}");
        }
        assert_eq!(code, Some(3), "{arguments:?}: {printed}");
    }
    machine.end_job();
    assert_eq!(fs::read_to_string(home.join(".profile")).unwrap(), "OF_PROFILE='my own'\n");
    assert!(!home.join(".bash_profile").exists());
}

#[test]
#[cfg_attr(not(has_ssh), ignore = "needs sshd, ssh, ssh-keygen and git")]
fn the_teardown_ends_access_and_open_sessions() {
    let machine = Machine::start();
    machine.start_job(&machine.job(&[RUN_UNTIL_GO]));
    let marker = format!("MARKER={}", machine.world.home().display());
    let inner = format!("env {marker} setsid sleep 1000 & sleep 1000");
    let through_script = format!("bash {} bash -c '{inner}'", script(&machine.world).display());
    let mut sessions = Vec::new();
    for (number, command) in [through_script, format!("bash -lc '{inner}'")].iter().enumerate() {
        let mut ssh = client(machine.server.port(), &machine.key);
        sessions.push(ssh.args(["127.0.0.1", command]).spawn().unwrap());
        wait_until(|| processes_with(&marker).len() > number, || format!("{command} does not run"));
    }
    machine.end_job();
    assert_eq!(processes_with(&marker), [""; 0]);
    for session in sessions {
        let session = wait_for_end(session);
        assert_ne!(session.status.code(), Some(0), "{session:?}");
    }
    let refused = machine.ssh("true");
    assert_eq!(refused.status.code(), REFUSED, "{refused:?}");
    // The next job has no keys, so it does not open access again.
    let mut next = job("2", &["ls -A ~/.ssh"]);
    next["ssh_public_keys"] = json!([]);
    assert_eq!(machine.agent.run_to_end(&next).result(), "passed");
    assert_eq!(machine.ssh("true").status.code(), REFUSED);
}

#[test]
#[cfg_attr(not(has_ssh), ignore = "needs sshd, ssh, ssh-keygen and git")]
fn each_of_several_keys_works_whatever_its_line_end() {
    let machine = Machine::start();
    let directory = machine.world.home().with_file_name("ssh");
    let names = ["first", "second", "third", "fourth"];
    let keys = names.map(|name| key(&directory, name, &["-t", "ed25519"]));
    let line = |key: &Path| fs::read_to_string(key.with_extension("pub")).unwrap();
    let [first, second, third, fourth] = keys.each_ref().map(|key| line(key).trim().to_owned());
    let mut request = machine.job(&[RUN_UNTIL_GO]);
    request["ssh_public_keys"] = json!([
        base64(format!("{first}\r\n{second}\r\n").as_bytes()),
        base64(format!("\n\n{third}").as_bytes()),
        "",
        base64(fourth.as_bytes()),
    ]);
    machine.start_job(&request);
    for key in &keys {
        let answer = machine.ssh_with(key, "echo in");
        assert_eq!(text(&answer), ("in\n".into(), Some(0)), "{}: {answer:?}", key.display());
    }
    assert_eq!(machine.ssh("true").status.code(), REFUSED);
    machine.end_job();
    assert_eq!(machine.ssh_with(&keys[1], "true").status.code(), REFUSED);
}

#[test]
#[cfg_attr(not(has_ssh), ignore = "needs sshd, ssh, ssh-keygen and git")]
fn earlier_access_and_its_sessions_are_not_affected() {
    let machine = Machine::start();
    let world = &machine.world;
    let owner = key(&world.home().with_file_name("ssh"), "owner", &["-t", "ed25519"]);
    fs::create_dir(world.home().join(".ssh")).unwrap();
    let owners = fs::read(owner.with_extension("pub")).unwrap();
    let authorized_keys = world.home().join(".ssh/authorized_keys");
    fs::write(&authorized_keys, &owners).unwrap();
    let mut session = client(machine.server.port(), &owner);
    let mut session = session.args(["-tt", "127.0.0.1"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut typed = session.stdin.take().unwrap();
    writeln!(typed, "touch ~/logged-in").unwrap();
    wait_until(|| world.home().join("logged-in").exists(), || "no login".into());
    machine.start_job(&machine.job(&[RUN_UNTIL_GO]));
    machine.end_job();
    writeln!(typed, "exit 5").unwrap();
    assert_eq!(wait_for_end(session).status.code(), Some(5));
    assert_eq!(machine.ssh_with(&owner, "exit 6").status.code(), Some(6));
    assert_eq!(fs::read(authorized_keys).unwrap(), owners);
}

/// Returns the files to which a job with keys adds lines, with mode and content. Files may vanish meanwhile.
fn files(home: &Path) -> Vec<(&'static str, u32, String)> {
    let paths = [".ssh/authorized_keys", ".bash_profile", ".profile", "../ssh_jump_point"];
    let found = paths.iter().filter_map(|path| {
        let mut file = fs::File::open(home.join(path)).ok()?;
        let mode = file.metadata().unwrap().permissions().mode() & 0o7777;
        let mut content = String::new();
        file.read_to_string(&mut content).unwrap();
        Some((*path, mode, content))
    });
    found.collect()
}

#[test]
fn every_file_is_restored_byte_for_byte() {
    let starts: [&[(&str, u32, &str)]; 4] = [
        &[],
        &[(".ssh/authorized_keys", 0o600, ""), (".bash_profile", 0o600, "")],
        &[
            (".ssh/authorized_keys", 0o600, "# no newline at the end"),
            (".bash_profile", 0o755, "export A=1"),
        ],
        &[
            (".ssh/authorized_keys", 0o600, "ssh-ed25519 AAAA semaphore-agent:me\n\n"),
            (".bash_profile", 0o640, "export A=1\r\n\n"),
            (".profile", 0o644, "export B=1\n"),
        ],
    ];
    for start in starts {
        let world = World::new();
        let home = world.home();
        for (path, mode, content) in start {
            fs::create_dir_all(home.join(path).parent().unwrap()).unwrap();
            fs::write(home.join(path), content).unwrap();
            fs::set_permissions(home.join(path), fs::Permissions::from_mode(*mode)).unwrap();
        }
        let agent = ServeAgent::start(&world);
        let before = files(&home);
        let mut request = job("1", &[RUN_UNTIL_GO]);
        request["ssh_public_keys"] = json!([base64(b"ssh-ed25519 AAAA of-the-job\n")]);
        agent.post_job(&request).of_status(200);
        agent.wait_for_log("1", RUNNING);
        let keys = home.join(".ssh/authorized_keys");
        let during = fs::read_to_string(&keys).unwrap();
        assert!(during.lines().any(|line| line.starts_with("ssh-ed25519 AAAA of-the-job ")));
        assert_eq!((mode(&keys), mode(&home.join(".ssh"))), (0o600, 0o700));
        assert_eq!(mode(&script(&world)), 0o600);
        fs::write(home.join("go"), "").unwrap();
        assert_eq!(agent.finish("1").result(), "passed");
        assert_eq!(files(&home), before);
    }
}

#[test]
fn a_job_without_keys_has_the_script_and_leaves_the_keys_alone() {
    let world = World::new();
    let agent = ServeAgent::start(&world);
    agent.post_job(&job("1", &[RUN_UNTIL_GO])).of_status(200);
    agent.wait_for_log("1", RUNNING);
    assert!(script(&world).exists());
    assert!(!world.home().join(".ssh").exists());
    fs::write(world.home().join("go"), "").unwrap();
    agent.finish("1");
    assert!(is_placeholder(&world));
    assert!(!world.home().join(".ssh").exists());
}

#[test]
fn a_longer_existing_script_is_replaced_completely() {
    let world = World::new();
    let old = format!("#!/bin/bash\n{}", "echo old\n".repeat(1000));
    fs::write(script(&world), &old).unwrap();
    let before = fs::metadata(script(&world)).unwrap().ino();
    let agent = ServeAgent::start(&world);
    agent.post_job(&job("1", &[RUN_UNTIL_GO])).of_status(200);
    agent.wait_for_log("1", RUNNING);
    let new = fs::read_to_string(script(&world)).unwrap();
    assert!(new.ends_with("exec \"$@\"\n") && !new.contains("old"), "{new}");
    assert_ne!(fs::metadata(script(&world)).unwrap().ino(), before);
    assert_eq!(mode(&script(&world)), 0o600);
    fs::write(world.home().join("go"), "").unwrap();
    agent.finish("1");
    assert!(is_placeholder(&world));
}

#[test]
fn planted_links_are_not_followed_and_the_job_runs() {
    for planted in [&[".ssh"][..], &[".ssh/authorized_keys", ".bash_profile"]] {
        let world = World::new();
        let home = world.home();
        let victim = world.file("victim", "mine\n");
        let directory = home.with_file_name("elsewhere");
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
        for path in planted {
            let path = home.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink(if path.ends_with(".ssh") { &directory } else { &victim }, path).unwrap();
        }
        symlink(&victim, script(&world)).unwrap();
        let agent = ServeAgent::start(&world);
        let mut request = job("1", &["echo hi"]);
        request["ssh_public_keys"] = json!([base64(b"ssh-ed25519 AAAA of-the-job\n")]);
        assert_eq!(agent.run_to_end(&request).output(), "hi\n");
        agent.wait_for_own_log(WARNING);
        assert_eq!(fs::read_to_string(&victim).unwrap(), "mine\n", "{planted:?}");
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
        assert_eq!(mode(&directory), 0o755);
        assert!(is_placeholder(&world));
        for path in planted {
            assert!(home.join(path).is_symlink(), "{path} stays as it was");
        }
    }
}

#[test]
fn ssh_access_ends_when_the_agent_is_killed() {
    let world = World::new();
    let home = world.home();
    fs::create_dir(home.join(".ssh")).unwrap();
    fs::write(home.join(".ssh/authorized_keys"), "# mine\n").unwrap();
    let keys = fs::Permissions::from_mode(0o600);
    fs::set_permissions(home.join(".ssh/authorized_keys"), keys).unwrap();
    let before = files(&home);
    let agent = ServeAgent::start(&world);
    let mut request = job("1", &[RUN_FOR_EVER]);
    request["ssh_public_keys"] = json!([base64(b"ssh-ed25519 AAAA of-the-job\n")]);
    agent.post_job(&request).of_status(200);
    agent.wait_for_log("1", RUNNING);
    assert_ne!(files(&home), before);
    agent.signal(Signal::SIGKILL);
    wait_until(|| files(&home) == before, || format!("{:?}", files(&home)));
}
