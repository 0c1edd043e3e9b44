//! Tells the tests which programs of this machine they can use: a test that lacks one is ignored,
//! with the reason, where people see it. On CI (`CI=true`) nothing is, and such a test fails.

use std::path::Path;

/// What the tests that clone over SSH need.
const SSH: [&str; 4] = ["/usr/sbin/sshd", "/usr/bin/ssh", "/usr/bin/ssh-keygen", "/usr/bin/git"];

fn main() {
    println!("cargo::rustc-check-cfg=cfg(has_ssh)");
    println!("cargo::rerun-if-env-changed=CI");
    for program in SSH {
        println!("cargo::rerun-if-changed={program}");
    }
    let on_ci = std::env::var_os("CI").is_some_and(|ci| ci == "true");
    if on_ci || SSH.iter().all(|program| Path::new(program).exists()) {
        println!("cargo::rustc-cfg=has_ssh");
    }
}
