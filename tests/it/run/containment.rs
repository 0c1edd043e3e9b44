//! No process that a job starts outlives the job.

use std::path::Path;

use nix::sys::signal::Signal;

use test_support::{Finished, World, job_of, processes_with};

/// Ways to escape from a shell; each prints `away` when it has.
const ESCAPES: [&str; 8] = [
    "sleep 1000 & echo away",
    "nohup sleep 1000 >/dev/null 2>&1 & echo away",
    "setsid sleep 1000 >/dev/null 2>&1 </dev/null & echo away",
    // A daemon: forked twice, in a session of its own.
    "(setsid bash -c 'sleep 1000 & exec sleep 1000' >/dev/null 2>&1 </dev/null &) ; echo away",
    // Ignores all signals that can be ignored.
    "bash -c \"trap '' HUP INT TERM QUIT; echo away; while :; do sleep 1000; done\" & wait -n & read -r <> <(:) -t 0.2; true",
    "setsid -f bash -c \"trap '' HUP INT TERM QUIT; sleep 1000; sleep 1000\"; echo away",
    // A stopped process only reacts to SIGKILL and SIGCONT.
    "sleep 1000 & kill -STOP $!; disown -a; echo away",
    // Without its environment, and under another name.
    "(exec -a innocent env -i setsid sleep 1000 >/dev/null 2>&1 </dev/null &); echo away",
];

/// An unprivileged user.
const NOBODY: u32 = 65534;

/// Returns a job of these commands as JSON text, and the marker of all its processes.
fn marked(commands: &[&str]) -> (String, String) {
    let (job, marker) = test_support::marked(serde_json::from_str(&job_of(commands)).unwrap());
    (job.to_string(), marker)
}

#[test]
fn nothing_survives_the_normal_end() {
    let (job, marker) = marked(&ESCAPES);
    let finished = World::new().run(&job);
    assert_eq!(finished.result(), "passed", "{finished:?}");
    assert_eq!(processes_with(&marker), [""; 0]);
}

#[test]
fn nothing_survives_without_privileges() {
    use std::os::unix::process::CommandExt as _;
    if !nix::unistd::geteuid().is_root() {
        // Without root, all other tests already run unprivileged.
        return;
    }
    let mut commands = ESCAPES.to_vec();
    commands.push("id -u; ! grep semaphore-agent /proc/self/cgroup");
    let (job, marker) = marked(&commands);
    let world = World::new();
    let path = world.file("job.json", job);
    let program = world.file("agent", std::fs::read(test_support::agent_program()).unwrap());
    for path in [world.home().parent().unwrap(), &world.home(), &path, &program] {
        std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(&program, mode).unwrap();
    let mut agent = std::process::Command::new(program);
    agent.uid(NOBODY).gid(NOBODY).current_dir("/");
    agent
        .env_clear()
        .envs(world.agent().get_envs().filter_map(|(name, value)| Some((name, value?))));
    agent.args(["run", "--output", "json"]).arg(path).stdin(std::process::Stdio::null());
    let finished = Finished::of(&agent.output().unwrap());
    assert_eq!(finished.result(), "passed", "{finished:?}");
    assert_eq!(finished.commands().last().unwrap().0, "65534\n");
    assert_eq!(processes_with(&marker), [""; 0]);
}

#[test]
fn nothing_survives_a_stop() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let mut commands = ESCAPES.to_vec();
        commands.push("echo running; sleep 1000; touch ~/deployed");
        let (job, marker) = marked(&commands);
        let world = World::new();
        let mut running = world.start(&job);
        running.wait_for_output("running\n");
        assert!(!processes_with(&marker).is_empty());
        running.signal(signal);
        let finished = running.finish();
        assert_eq!((finished.result(), finished.exit_code), ("stopped", Some(130)), "{signal}");
        assert_eq!(processes_with(&marker), [""; 0]);
        assert!(!world.home().join("deployed").exists());
    }
}

#[test]
fn nothing_survives_when_the_agent_is_killed() {
    let mut commands = ESCAPES.to_vec();
    commands.push("echo running; sleep 1000");
    let (job, marker) = marked(&commands);
    let world = World::new();
    let mut running = world.start(&job);
    running.wait_for_output("running\n");
    running.signal(Signal::SIGKILL);
    running.child.wait().unwrap();
    // The agent can't report the end of the clean-up, so the test watches the processes.
    wait_until(|| processes_with(&marker).is_empty());
    wait_until(|| std::fs::read_dir(world.state()).unwrap().count() == 0);
}

#[test]
fn nothing_survives_the_death_of_job_init() {
    let mut commands = ESCAPES.to_vec();
    commands.push("kill -9 $PPID; sleep 1000; touch ~/deployed");
    let (job, marker) = marked(&commands);
    let world = World::new();
    let finished = world.run(&job);
    assert_eq!(finished.result(), "failed");
    assert_eq!(processes_with(&marker), [""; 0]);
    assert!(!world.home().join("deployed").exists());
}

#[test]
fn nothing_survives_a_shell_that_ended_by_itself() {
    let mut commands = ESCAPES.to_vec();
    commands.push("exec sleep 0");
    let (job, marker) = marked(&commands);
    assert_eq!(World::new().run(&job).result(), "failed");
    assert_eq!(processes_with(&marker), [""; 0]);
}

#[test]
fn a_tree_of_hundreds_of_processes_is_ended() {
    let tree = "b() { (($1 > 0)) || exec sleep 1000; b $(($1 - 1)) & b $(($1 - 1)) & wait; }";
    let plant = format!("{tree}; trap '' TERM; b 7 >/dev/null 2>&1 & echo planted");
    let (job, marker) = marked(&[&plant]);
    assert_eq!(World::new().run(&job).result(), "passed");
    assert_eq!(processes_with(&marker), [""; 0]);
}

#[test]
fn a_chain_of_short_lived_processes_is_ended() {
    // Each process starts a successor and ends.
    let relay = "trap '' TERM HUP; m() { (sleep 0.002; m) & }; m >/dev/null 2>&1; echo off";
    let (job, marker) = marked(&[relay]);
    assert_eq!(World::new().run(&job).result(), "passed");
    assert_eq!(processes_with(&marker), [""; 0]);
}

#[test]
fn processes_get_sigterm_before_sigkill() {
    let world = World::new();
    let server = "bash -c 'trap \"echo asked >~/asked; exit\" TERM; touch ~/ready; while :; do sleep 0.01; done' &";
    let ready = "until [[ -e ~/ready ]]; do sleep 0.01; done";
    assert_eq!(world.run_commands(&[server, ready]).result(), "passed");
    assert_eq!(std::fs::read_to_string(world.home().join("asked")).unwrap(), "asked\n");
}

#[test]
fn the_exit_trap_of_the_shell_runs_at_the_normal_end() {
    let world = World::new();
    world.run_commands(&["trap 'echo cleaned >~/cleaned' EXIT"]);
    assert!(world.home().join("cleaned").exists());
}

#[test]
fn no_control_group_is_left() {
    for last in ["true", "kill -9 $PPID; sleep 1000"] {
        let finished = World::new().run_commands(&["cat /proc/self/cgroup", last]);
        let group = finished.output();
        let group = group.lines().find_map(|line| Some(line.split_once("semaphore-agent-job-")?.1));
        let Some(group) = group else { return };
        assert_eq!(directories_called("/sys/fs/cgroup".as_ref(), group), [""; 0], "after {last}");
    }
}

fn directories_called(below: &Path, ending: &str) -> Vec<String> {
    let mut found = Vec::new();
    // Control groups of other programs come and go during the walk.
    let Ok(entries) = std::fs::read_dir(below) else { return found };
    for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())) {
        let path = entry.path();
        if path.display().to_string().ends_with(ending) {
            found.push(path.display().to_string());
        }
        found.extend(directories_called(&path, ending));
    }
    found
}

#[test]
fn leftovers_of_a_power_cut_are_removed_by_the_next_agent() {
    let world = World::new();
    world.run_commands(&["true"]);
    let left = world.state().join("job-0123456789ab/scratch");
    std::fs::create_dir_all(&left).unwrap();
    std::fs::write(left.join("environment-1"), "export SECRET='x'").unwrap();
    world.run_commands(&["true"]);
    assert_eq!(std::fs::read_dir(world.state()).unwrap().count(), 0);
}

#[test]
fn another_agent_does_not_remove_the_directory_of_a_running_job() {
    let world = World::new();
    let mut running = world
        .start(&job_of(&["echo running; until [[ -e ~/go ]]; do sleep 0.01; done", "echo next"]));
    running.wait_for_output("running\n");
    assert_eq!(world.run_commands(&["touch ~/go"]).result(), "passed");
    assert_eq!(running.finish().result(), "passed");
}

#[test]
fn a_state_directory_that_others_can_read_is_refused_and_not_changed() {
    use std::os::unix::fs::PermissionsExt as _;
    let world = World::new();
    std::fs::create_dir(world.state()).unwrap();
    std::fs::set_permissions(world.state(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let finished = world.run_commands(&["true"]);
    assert_eq!(finished.exit_code, Some(1));
    assert!(finished.stderr.contains("chmod 700"), "{}", finished.stderr);
    assert_eq!(std::fs::metadata(world.state()).unwrap().permissions().mode() & 0o777, 0o755);
}

fn wait_until(done: impl Fn() -> bool) {
    let deadline = std::time::SystemTime::now() + std::time::Duration::from_secs(20);
    while !done() {
        assert!(std::time::SystemTime::now() < deadline, "it took too long");
        test_support::pause();
    }
}
