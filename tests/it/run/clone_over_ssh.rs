//! The typical job: clone a repository with a key from the job, and run its tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use test_support::ssh::{SshServer, assert_hidden, key, run, user};
use test_support::{Finished, World, base64, wait_for_end};

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

/// An SSH server with a repository, and the key for it.
struct Forge {
    // Fields are dropped in this order: the server must end before its files are deleted.
    server: SshServer,
    _directory: tempfile::TempDir,
    repository: PathBuf,
    private_key: String,
}

impl Forge {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let key = key(path, "client_key", &["-t", "rsa", "-b", "2048", "-m", "PEM"]);
        let environment = [("PATH", &*std::env::var("PATH").unwrap())];
        Self {
            repository: repository(path),
            private_key: fs::read_to_string(&key).unwrap(),
            server: SshServer::start(path, &key.with_extension("pub"), &environment),
            _directory: directory,
        }
    }

    /// Returns a job that clones the repository with an injected key of this mode, and runs its tests.
    fn job(&self, mode: &str) -> String {
        // ssh ignores $HOME and looks up the home directory, so every path is given.
        let ssh = format!(
            "ssh -F none -i ~/.ssh/id_rsa -p {} -o IdentitiesOnly=yes -o BatchMode=yes \
             -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null",
            self.server.port()
        );
        let clone = format!("git clone {}@127.0.0.1:{} project", user(), self.repository.display());
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

    /// Runs the job, and asserts that the agent's output contains no part of the key.
    fn run_job(&self, world: &World, mode: &str) -> Finished {
        let job = world.file("job.json", self.job(mode));
        let mut command = world.agent();
        command.args(["run", "--output", "json"]).arg(job);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = wait_for_end(command.spawn().unwrap());
        let printed = [&output.stdout[..], &output.stderr].concat();
        let printed = String::from_utf8(printed).unwrap();
        assert_hidden(&self.private_key, &printed);
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

/// ssh checks the modes of keys, which shows that an injected file has the requested mode.
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
