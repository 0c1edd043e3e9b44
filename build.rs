//! Tells the tests which programs of this machine they can use: a test that lacks one is ignored,
//! with the reason, where people see it. On CI (`CI=true`) nothing is, and such a test fails.

use std::path::Path;

/// What tests need besides bash: the name of a `cfg`, and the programs it stands for.
const NEEDS: [(&str, &[&str]); 4] = [
    ("has_ssh", &["/usr/sbin/sshd", "/usr/bin/ssh", "/usr/bin/ssh-keygen", "/usr/bin/git"]),
    ("has_curl", &["/usr/bin/curl", "/usr/bin/perl"]),
    ("has_docker", &["/usr/bin/docker", "/var/run/docker.sock", "/usr/bin/apt-get"]),
    ("has_registry", &["/usr/bin/docker-registry", "/usr/bin/htpasswd"]),
];

fn main() {
    println!("cargo::rerun-if-env-changed=CI");
    let on_ci = std::env::var_os("CI").is_some_and(|ci| ci == "true");
    for (name, programs) in NEEDS {
        println!("cargo::rustc-check-cfg=cfg({name})");
        for program in programs {
            println!("cargo::rerun-if-changed={program}");
        }
        if on_ci || programs.iter().all(|program| Path::new(program).exists()) {
            println!("cargo::rustc-cfg={name}");
        }
    }
}
