//! What jobs are for: get a repository with a key that came with the job, and run its tests.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::unistd::{User, geteuid};

use crate::support::{Finished, World, base64, wait_for_end};

const SSHD: &str = "/usr/sbin/sshd";

/// How many ports to try: between finding a free one and listening on it, it can be taken.
const PORTS: usize = 5;

/// An SSH server of this test's own, on the loopback interface. Ends with this value.
struct SshServer {
    process: Child,
    port: u16,
}

impl SshServer {
    fn start(directory: &Path, user: &str, authorized_keys: &Path) -> Self {
        if geteuid().is_root() {
            // Where it locks up its unprivileged part; packages make it when the service starts.
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true).mode(0o755).create("/run/sshd").unwrap();
        }
        let host_key = key(directory, "host_key");
        for _ in 0..PORTS {
            // Free again at the end of this line.
            let free = TcpListener::bind("127.0.0.1:0").and_then(|port| port.local_addr());
            let port = free.unwrap().port();
            let config = format!(
                "ListenAddress 127.0.0.1:{port}\nHostKey {}\nAuthorizedKeysFile {}\n\
                 AllowUsers {user}\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
                 UsePAM no\nStrictModes no\nPidFile none\nPrintMotd no\nSetEnv PATH={}\n",
                host_key.display(),
                authorized_keys.display(),
                std::env::var("PATH").unwrap(),
            );
            let path = directory.join("sshd_config");
            fs::write(&path, config).unwrap();
            if let Some(server) = Self::listening(&path, port) {
                return server;
            }
        }
        panic!("{SSHD} found no port to listen on");
    }

    /// Nothing if it ends instead.
    fn listening(config: &Path, port: u16) -> Option<Self> {
        let mut command = Command::new(SSHD);
        command.args(["-D", "-e", "-f"]).arg(config);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let server = Self { process, port };
        let is_ready = |line: &String| {
            println!("sshd: {line}");
            line.starts_with("Server listening on ")
        };
        lines.by_ref().map_while(Result::ok).find(is_ready)?;
        // Read to the end: a full pipe would hold it up. Shown if the test fails.
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                println!("sshd: {line}");
            }
        });
        Some(server)
    }
}

impl Drop for SshServer {
    fn drop(&mut self) {
        // It has ended if that fails; a panic on the way out of a failed test would hide it.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Runs a program that must succeed, away from the configuration of who runs the tests.
fn run(home: &Path, program: &str, arguments: &[&str]) {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(home).env_clear();
    command.env("PATH", std::env::var_os("PATH").unwrap());
    command.env("HOME", home).env("GIT_CONFIG_NOSYSTEM", "1");
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
}

/// Makes a key pair; answers the private key's path.
fn key(directory: &Path, name: &str) -> PathBuf {
    let arguments =
        ["-q", "-t", "rsa", "-b", "2048", "-m", "PEM", "-N", "", "-C", "test", "-f", name];
    run(directory, "ssh-keygen", &arguments);
    directory.join(name)
}

/// Makes a bare repository with a test script in it.
fn repository(directory: &Path) -> PathBuf {
    let work = directory.join("work");
    fs::create_dir(&work).unwrap();
    fs::write(work.join("test.sh"), "echo \"$((6 * 7)) tests passed\"\n").unwrap();
    run(&work, "git", &["init", "-q"]);
    run(&work, "git", &["add", "."]);
    let author = ["-c", "user.name=Test", "-c", "user.email=test@example.com"];
    run(&work, "git", &[&author[..], &["commit", "-q", "-m", "Tests"]].concat());
    run(directory, "git", &["clone", "-q", "--bare", "work", "project.git"]);
    directory.join("project.git")
}

/// A server with a repository, and a key that opens it.
struct Forge {
    // Fields go in this order: the server before its files.
    server: SshServer,
    _directory: tempfile::TempDir,
    repository: PathBuf,
    private_key: String,
    user: String,
}

impl Forge {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let user = User::from_uid(geteuid()).unwrap().unwrap().name;
        let key = key(path, "client_key");
        Self {
            repository: repository(path),
            private_key: fs::read_to_string(&key).unwrap(),
            server: SshServer::start(path, &user, &key.with_extension("pub")),
            user,
            _directory: directory,
        }
    }

    /// A job that gets the repository with an injected key of this mode, and runs its tests.
    fn job(&self, mode: &str) -> String {
        // ssh asks the system for the home directory, not $HOME, so every path is given.
        let ssh = format!(
            "ssh -F none -i ~/.ssh/id_rsa -p {} -o IdentitiesOnly=yes -o BatchMode=yes \
             -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null",
            self.server.port
        );
        let clone =
            format!("git clone {}@127.0.0.1:{} project", self.user, self.repository.display());
        let commands = [
            format!("export GIT_SSH_COMMAND=\"{ssh}\""),
            clone,
            "cd project".into(),
            "bash test.sh".into(),
        ];
        serde_json::json!({
            "job_id": "clone",
            "env_vars": [{"name": "DEPLOY_KEY", "value": base64(self.private_key.as_bytes())}],
            "files": [{
                "path": ".ssh/id_rsa",
                "content": base64(self.private_key.as_bytes()),
                "mode": mode,
            }],
            "commands": commands.map(|directive| serde_json::json!({"directive": directive})),
        })
        .to_string()
    }

    /// Runs the job; nothing of the key may be in what the agent prints.
    fn run_job(&self, world: &World, mode: &str) -> Finished {
        let job = world.file("job.json", self.job(mode));
        let mut command = world.agent();
        command.args(["run", "--output", "json"]).arg(job);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = wait_for_end(command.spawn().unwrap());
        let printed = [&output.stdout[..], &output.stderr].concat();
        let printed = String::from_utf8(printed).unwrap();
        let encoded = base64(self.private_key.as_bytes());
        let encoded = encoded.as_bytes().chunks(64).map(|part| str::from_utf8(part).unwrap());
        for secret in self.private_key.lines().chain(encoded) {
            assert!(!printed.contains(secret), "the key is in the log: {secret:?}");
        }
        Finished::of(&output)
    }
}

#[test]
#[cfg_attr(not(has_ssh), ignore = "needs sshd, ssh, ssh-keygen and git")]
fn a_job_clones_with_its_key_and_runs_the_tests() {
    let forge = Forge::start();
    let world = World::new();
    let finished = forge.run_job(&world, "0600");
    assert_eq!(finished.result(), "passed", "{:#?}", finished.steps());
    let commands = finished.commands();
    assert_eq!(commands[3], ("42 tests passed\n".into(), 0), "{commands:?}");
    let injected =
        format!("Injecting {}/.ssh/id_rsa with file mode 0600\n", world.home().display());
    let steps = finished.steps();
    assert_eq!(steps[0].1, "Exporting DEPLOY_KEY\n");
    assert_eq!(steps[1].1, injected);
    assert_eq!(fs::read_to_string(world.home().join(".ssh/id_rsa")).unwrap(), forge.private_key);
}

/// ssh is particular about modes; this shows that the one asked for is the one a file gets.
#[test]
#[cfg_attr(not(has_ssh), ignore = "needs sshd, ssh, ssh-keygen and git")]
fn a_key_that_others_can_read_is_refused_by_ssh() {
    let forge = Forge::start();
    let finished = forge.run_job(&World::new(), "0644");
    assert_eq!(finished.result(), "failed");
    let commands = finished.commands();
    assert_eq!(commands.len(), 2, "{commands:?}");
    let (clone, exit_code) = &commands[1];
    assert!(clone.contains("UNPROTECTED PRIVATE KEY FILE"), "{clone}");
    assert_eq!(*exit_code, 128);
}
