//! A real OpenSSH server for one test.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::unistd::{User, geteuid};

const SSHD: &str = "/usr/sbin/sshd";

/// Number of ports to try: another process may take a free port before the server listens on it.
const PORTS: usize = 5;

/// An SSH server on the loopback interface for the user who runs the tests; ends on drop.
pub struct SshServer {
    process: Child,
    port: u16,
}

impl SshServer {
    /// Starts a server whose sessions have the variables in `environment`, which override the usual ones.
    pub fn start(directory: &Path, authorized_keys: &Path, environment: &[(&str, &str)]) -> Self {
        if geteuid().is_root() {
            // The privilege separation directory, which the system service usually creates.
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true).mode(0o755).create("/run/sshd").unwrap();
        }
        let host_key = key(directory, "host_key", &["-t", "ed25519"]);
        let environment: String =
            environment.iter().map(|(name, value)| format!(" {name}={value}")).collect();
        for _ in 0..PORTS {
            let port = crate::free_port();
            // `StrictModes no`: strict modes refuse keys below a world-writable directory, such as `/tmp`.
            let config = format!(
                "ListenAddress 127.0.0.1:{port}\nHostKey {}\nAuthorizedKeysFile {}\n\
                 AllowUsers {}\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
                 UsePAM no\nStrictModes no\nPidFile none\nPrintMotd no\nSetEnv{environment}\n",
                host_key.display(),
                authorized_keys.display(),
                user(),
            );
            let path = directory.join("sshd_config");
            fs::write(&path, config).unwrap();
            if let Some(server) = Self::listening(&path, port) {
                return server;
            }
        }
        panic!("{SSHD} could not listen on any port");
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Starts the server and waits until it listens. Returns `None` if it ends instead.
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
        // Read to the end, because a full pipe would block the server. The output is shown if the test fails.
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
        // Fails if the server has ended. Do not panic: this may run during the panic of a failed test.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Returns the name of the user who runs the tests.
pub fn user() -> String {
    User::from_uid(geteuid()).unwrap().unwrap().name
}

/// Makes a key pair and returns the private key's path.
pub fn key(directory: &Path, name: &str, kind: &[&str]) -> PathBuf {
    let arguments = [&["-q", "-N", "", "-C", "test", "-f", name], kind].concat();
    run(directory, "ssh-keygen", &arguments);
    directory.join(name)
}

/// Fails if a part of a private key, plain or in base64 as in jobs, is in the printed text.
pub fn assert_hidden(private_key: &str, printed: &str) {
    let encoded = crate::base64(private_key.as_bytes());
    let encoded = encoded.as_bytes().chunks(64).map(|part| str::from_utf8(part).unwrap());
    for secret in private_key.lines().chain(encoded) {
        assert!(!printed.contains(secret), "the key is in the log: {secret:?}");
    }
}

/// Returns an SSH client that ignores the user's configuration and never prompts.
pub fn client(port: u16, private_key: &Path) -> Command {
    let mut command = Command::new("ssh");
    command.args(["-F", "none", "-p", &port.to_string(), "-i"]).arg(private_key);
    for option in [
        "IdentitiesOnly=yes",
        "BatchMode=yes",
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "LogLevel=ERROR",
    ] {
        command.args(["-o", option]);
    }
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("TERM", "dumb");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs a program, which must succeed, without the configuration of the user who runs the tests.
pub fn run(home: &Path, program: &str, arguments: &[&str]) {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(home).env_clear();
    command.env("PATH", std::env::var_os("PATH").unwrap());
    command.env("HOME", home).env("GIT_CONFIG_NOSYSTEM", "1");
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
}
