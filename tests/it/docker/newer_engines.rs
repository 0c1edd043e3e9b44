//! Engines with a newer API, whose responses lack some fields: this machine's engine, behind a socket that
//! rewrites the messages.

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use serde_json::json;

use test_support::World;
use test_support::docker::{container, file, job_in, leftovers_of};

const ENGINE: &str = "/var/run/docker.sock";

/// Replacements of the same length, in requests and in responses.
const TO_ENGINE: [(&str, &str); 1] = [("/v1.52/", "/v1.41/")];
const BY_ENGINE: [(&str, &str); 6] = [
    (r#""ApiVersion":"1.41""#, r#""ApiVersion":"1.52""#),
    // Fields that were removed in Engines 25 to 29.
    (r#""VirtualSize":"#, r#""NoSuchField":"#),
    (r#""AttachStderr":"#, r#""NoSuchField_":"#),
    (r#""Bridge":"#, r#""NoSuch":"#),
    (r#""IPAM":"#, r#""None":"#),
    (r#""ContainerConfig":"#, r#""NoSuchFieldInIt":"#),
];

fn rewrite(from: &mut UnixStream, to: &mut UnixStream, words: &[(&str, &str)]) {
    let mut part = vec![0; 256 * 1024];
    while let Ok(count @ 1..) = from.read(&mut part) {
        for (old, new) in words {
            assert_eq!(old.len(), new.len());
            let mut at = 0;
            while let Some(found) =
                part[at..count].windows(old.len()).position(|part| part == old.as_bytes())
            {
                at += found;
                part[at..at + old.len()].copy_from_slice(new.as_bytes());
            }
        }
        if to.write_all(&part[..count]).is_err() {
            break;
        }
    }
    // Fails if the connection has already ended.
    let _ = to.shutdown(std::net::Shutdown::Write);
}

fn newer_engine(socket: &Path) {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        for near in listener.incoming() {
            let (mut near, mut far) = (near.unwrap(), UnixStream::connect(ENGINE).unwrap());
            let [mut near_too, mut far_too] =
                [&near, &far].map(|stream| stream.try_clone().unwrap());
            std::thread::spawn(move || rewrite(&mut near, &mut far, &TO_ENGINE));
            std::thread::spawn(move || rewrite(&mut far_too, &mut near_too, &BY_ENGINE));
        }
    });
}

#[test]
#[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
fn a_job_runs_on_a_newer_engine_and_leaves_nothing() {
    let world = World::new();
    let socket = world.home().join("engine.sock");
    newer_engine(&socket);
    let mut side = container("web", "service");
    side["files"] = json!([file("/www/index.html", b"from a file\n", "0644")]);
    let mut job =
        job_in(json!([container("main", "bash"), side]), &["wget -q -O - http://web:8080/"]);
    job["files"] = json!([file("f", b"x", "0600")]);
    let path = world.file("job.json", job.to_string());
    let running = world.start_file_with(&path, |command| {
        command.env("DOCKER_HOST", format!("unix://{}", socket.display()));
    });
    let finished = running.finish();
    assert_eq!(finished.result(), "passed", "{:#?}", finished.steps());
    assert!(finished.output().ends_with("from a file\n"), "{finished:#?}");
    assert_eq!(leftovers_of(&job), [""; 0]);
}
