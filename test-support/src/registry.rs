//! A real image registry for one test, from Debian's `docker-registry` and `apache2-utils`.

use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::feed;
use crate::http::Request;

/// The user who may push and pull.
pub const USER: &str = "tester";

/// A password whose base64 encoding, at any offset, has digits in which the standard and URL alphabets
/// differ.
pub const PASSWORD: &str = "?>~?>~?>~?";

/// A registry on the loopback interface, to which engines connect without TLS. On drop, it ends, and its
/// images are removed from the engine.
pub struct Registry {
    process: Child,
    address: String,
    directory: TempDir,
    images: Vec<String>,
}

impl Registry {
    pub fn start() -> Self {
        Self::for_users(&[])
    }

    /// Starts a registry that has more users, given by name and password.
    pub fn for_users(others: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let mut users = hashed(USER, PASSWORD);
        users.extend(others.iter().flat_map(|(name, password)| hashed(name, password)));
        fs::write(path.join("htpasswd"), users).unwrap();
        let config = serde_json::json!({
            "version": "0.1",
            "storage": { "filesystem": { "rootdirectory": path.join("storage") } },
            "http": { "addr": "127.0.0.1:0" },
            "auth": { "htpasswd": { "realm": "tests", "path": path.join("htpasswd") } },
        });
        // The registry expects YAML, of which JSON is a subset.
        fs::write(path.join("config.yml"), config.to_string()).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(path.join("config.yml")).stdin(Stdio::null());
        let mut process = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut lines = lines.map_while(Result::ok).inspect(|line| println!("registry: {line}"));
        let address = lines.find_map(|line| {
            let (_, rest) = line.split_once("listening on ")?;
            Some(rest.split('"').next()?.to_owned())
        });
        // Read to the end, because a full pipe would block the registry. The output is shown if the test
        // fails.
        std::thread::spawn(move || lines.for_each(drop));
        let address = address.unwrap();
        Self { process, address, directory, images: Vec::new() }
    }

    /// Returns host and port, with which the names of its images begin.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Pushes an image of the engine to the registry as `name`. Returns the image's full name, which the
    /// engine does not know until it pulls the image.
    pub fn push(&mut self, image: &str, name: &str) -> String {
        let pushed = format!("{}/{name}", self.address);
        self.images.push(pushed.clone());
        self.docker(&["tag", image, &pushed]);
        let mut login = self.command(&["login", "-u", USER, "--password-stdin", &self.address]);
        login.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut login = login.spawn().unwrap();
        feed(&mut login, PASSWORD.as_bytes());
        let output = login.wait_with_output().unwrap();
        assert!(output.status.success(), "docker login: {output:?}");
        self.docker(&["push", "-q", &pushed]);
        self.docker(&["image", "rm", &pushed]);
        pushed
    }

    fn docker(&self, arguments: &[&str]) {
        let output = self.command(arguments).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "docker {arguments:?}: {output:?}");
    }

    /// Returns a `docker` command without the configuration of the user who runs the tests.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.arg("--config").arg(self.directory.path().join("docker")).args(arguments);
        command
    }
}

/// Returns a line of the registry's `htpasswd` file.
fn hashed(name: &str, password: &str) -> Vec<u8> {
    let mut htpasswd = Command::new("htpasswd");
    htpasswd.args(["-niB", "-C", "4", name]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut htpasswd = htpasswd.spawn().unwrap();
    feed(&mut htpasswd, password.as_bytes());
    let line = htpasswd.wait_with_output().unwrap();
    assert!(line.status.success(), "{line:?}");
    let mut line = line.stdout.trim_ascii().to_vec();
    line.push(b'\n');
    line
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Ignore errors: this may run during the panic of a failed test.
        let _ = self.process.kill();
        let _ = self.process.wait();
        for image in &self.images {
            let _ = self.command(&["image", "rm", image]).stderr(Stdio::null()).output();
        }
    }
}

/// Starts a scripted stand-in for a registry: `answer` makes the response to each request. Returns its
/// address.
pub fn answering(answer: impl Fn(&Request) -> Reply + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // Engines try TLS first, which fails as an HTTP request.
            let _ = reply(stream.unwrap(), &answer);
        }
    });
    address
}

/// Status, one header, body.
pub type Reply = (&'static str, &'static str, &'static str);

fn reply(stream: TcpStream, answer: &impl Fn(&Request) -> Reply) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    let (status, header, body) = answer(&Request::read_from(&mut reader)?);
    let length = body.len();
    let message = format!(
        "HTTP/1.1 {status}\r\nDocker-Distribution-Api-Version: registry/2.0\r\n{header}\r\n\
         Content-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    );
    reader.get_mut().write_all(message.as_bytes())
}
