//! A job runs as the same user as the agent and as job-init, the guard of a shell job. The job can kill and
//! stop both, but can't read their memory; and in the end, the job's processes are always removed.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::libc;
use nix::unistd::Pid;
use serde_json::Value;
use tokio::time::Instant;

use test_support::daemon::spawned;
use test_support::serve::ServeAgent;
use test_support::surroundings::{
    OPERATOR, as_user, can_switch_user, in_shell, without_control_groups,
};
use test_support::{
    Finished, KilledOnFailure, RUN_FOR_EVER, RUN_UNTIL_GO, RUNNING, World, job, job_of, marked,
    processes_with, wait_for_end, wait_until,
};

/// Sets `$agent` in a job. The job-init process is `$PPID`.
const FIND_AGENT: &str = "agent=$(awk '/^PPid:/ {print $2}' /proc/$PPID/status)";

/// Returns a job that tries to inspect its job-init and the agent, and prints what succeeded.
fn inspecting_job() -> String {
    let ptrace = |request: u32| {
        let number = libc::SYS_ptrace;
        format!("perl -e 'exit(syscall({number}, {request}, $ARGV[0] + 0, 0, 0) == -1)' $1")
    };
    let (attach, seize) = (ptrace(16), ptrace(0x4206));
    format!(
        "{FIND_AGENT}
        try() {{
          cat /proc/$1/environ >/dev/null && echo \"$2: its environment\"
          : < /proc/$1/mem && echo \"$2: reading its memory\"
          : > /proc/$1/mem && echo \"$2: writing its memory\"
          ls /proc/$1/fd/ >/dev/null && echo \"$2: its descriptors\"
          {seize} && echo \"$2: seizing\"
          {attach} && {{ echo \"$2: attaching\"; kill -CONT $1; }}
        }}
        for name in perl; do command -v $name >/dev/null || echo \"no $name\"; done
        tr '\\0' ' ' < /proc/$PPID/cmdline; echo
        exec 3>&1
        {{ try $PPID 'first process' >&3; try $agent agent >&3; }} 2>/dev/null | cat
        true"
    )
}

/// Asserts that the job of [`inspecting_job`] could not inspect any process.
fn assert_blind(output: &str) {
    assert!(output.contains("job-init"), "its parent is another: {output}");
    if output.contains("no perl") {
        eprintln!("skipped: without perl nobody tries to attach");
    }
    let seen: Vec<_> = output.lines().filter(|line| line.contains(": ")).collect();
    assert!(seen.is_empty(), "{seen:#?}");
}

#[test]
fn a_served_job_can_not_inspect_job_init_or_the_agent() {
    if !can_switch_user() {
        return;
    }
    let world = World::new();
    let agent = ServeAgent::start_with(&world, |command| as_user(&world, OPERATOR, command));
    assert_blind(&agent.run_to_end(&job("1", &[&inspecting_job()])).output());
}

#[test]
fn a_job_from_a_file_can_not_inspect_job_init_or_the_agent() {
    if !can_switch_user() {
        return;
    }
    let world = World::new();
    let file = world.file("job.json", job_of(&[&inspecting_job()]));
    let mut agent = world.agent();
    agent.args(["run", "--output", "json"]).arg(file);
    as_user(&world, OPERATOR, &mut agent);
    let agent = spawned(agent.stdout(Stdio::piped()).stderr(Stdio::piped()));
    assert_blind(&Finished::of(&wait_for_end(agent)).output());
}

/// Returns the process ID that a job has written to a file.
fn number_in(world: &World, name: &str) -> Pid {
    let path = world.home().join(name);
    let read = || fs::read_to_string(&path).ok()?.trim().parse().ok();
    wait_until(|| read().is_some(), || format!("{name} contains no process ID"));
    Pid::from_raw(read().unwrap())
}

#[test]
fn job_init_does_not_hold_the_agents_output_open() {
    if !can_switch_user() {
        return;
    }
    let world = World::new();
    let agent = ServeAgent::start(&world);
    agent.post_job(&job("1", &["echo $PPID > ~/first", RUN_UNTIL_GO])).of_status(200);
    let first = number_in(&world, "first");
    let descriptor = |number| fs::read_link(format!("/proc/{first}/fd/{number}")).unwrap();
    assert_eq!(descriptor(2), Path::new("/dev/null"));
    fs::write(world.home().join("go"), "").unwrap();
    assert_eq!(agent.finish("1").result(), "passed");
}

#[test]
fn the_kernel_kills_job_processes_first_when_memory_is_short() {
    let look = "cat /proc/$$/oom_score_adj";
    let surroundings: [fn(&World, &mut Command); 3] = [
        |_, _| {},
        |_, command| in_shell(command, "echo 77 > /proc/self/oom_score_adj"),
        |world, command| {
            in_shell(command, "echo 77 > /proc/self/oom_score_adj");
            if can_switch_user() {
                as_user(world, OPERATOR, command);
            }
        },
    ];
    for (number, surroundings) in surroundings.into_iter().enumerate() {
        let world = World::new();
        fs::write(world.home().join(".bash_profile"), format!("{look} > ~/at-first\n")).unwrap();
        let agent = ServeAgent::start_with(&world, |command| surroundings(&world, command));
        let own = fs::read_to_string(format!("/proc/{}/oom_score_adj", agent.pid())).unwrap();
        assert!(number == 0 || own == "77\n", "{own}");
        let commands = [look, "bash -c 'cat /proc/$$/oom_score_adj'"];
        let first =
            format!("{FIND_AGENT}; cat /proc/$PPID/oom_score_adj /proc/$agent/oom_score_adj");
        let finished = agent.run_to_end(&job("1", &[commands[0], commands[1], &first]));
        let printed: Vec<_> = finished.commands().into_iter().map(|(output, _)| output).collect();
        assert_eq!(printed, ["500\n".into(), "500\n".into(), format!("{own}{own}")]);
        let at_first = fs::read_to_string(world.home().join("at-first")).unwrap();
        assert_eq!(at_first, "500\n", "the adjustment comes too late for the login profile");
    }
}

/// Returns whether a process has ended, even if it is a zombie.
fn is_gone(process: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"));
    stat.map_or(true, |stat| {
        let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
        state.is_none_or(|state| state.starts_with(['Z', 'X']))
    })
}

/// Lets a job kill its job-init and its agent with `attack`, and asserts that the next agent, started in the
/// same surroundings, removes the job's processes and files.
fn assert_cleaned_up_after(attack: &str, surroundings: fn(&World, &mut Command)) {
    let world = World::new();
    // Also kills the process without the job's variables, so that a failed test leaves nothing behind.
    let _killed = KilledOnFailure(format!("HOME={}", world.home().display()));
    let detached = "setsid -f bash -c 'trap \"\" HUP TERM; echo $$ > ~/sleeper; exec sleep 1000'";
    let commands = [
        &format!("trap '' HUP TERM; echo $PPID > ~/first; {FIND_AGENT}"),
        &format!(
            "{detached} </dev/null >/dev/null 2>&1; until [[ -s ~/sleeper ]]; do sleep 0.01; done"
        ),
        &format!("{attack}; : > ~/done; sleep 1000"),
    ];
    let (request, marker) = marked(job("1", &commands.map(String::as_str)));
    let first_agent = ServeAgent::start_with(&world, |command| surroundings(&world, command));
    first_agent.post_job(&request).of_status(200);
    let (first, sleeper) = (number_in(&world, "first"), number_in(&world, "sleeper"));
    wait_until(|| is_gone(first_agent.pid()), || "the agent lives on".into());
    drop(first_agent);

    let agent = ServeAgent::start_with(&world, |command| surroundings(&world, command));
    let left =
        || (is_gone(sleeper), is_gone(first), processes_with(&marker), job_directories(&world));
    let nothing = (true, true, Vec::new(), Vec::new());
    wait_until(|| left() == nothing, || format!("left after {attack}: {:?}", left()));
    assert_eq!(agent.run_to_end(&job("2", &["echo next"])).output(), "next\n");
}

/// Returns the names of all job directories, of living and dead jobs.
fn job_directories(world: &World) -> Vec<String> {
    let names = fs::read_dir(world.state()).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains("job-")).collect()
}

/// Kills job-init and the agent at once.
const KILL_BOTH: &str = "kill -STOP $agent; kill -9 $PPID $agent";

/// Stops job-init, which would clean up, before the agent is killed.
const STOP_ONE_AND_KILL_THE_OTHER: &str = "kill -STOP $PPID; kill -9 $agent";

#[test]
fn the_next_agent_cleans_up_after_a_job_that_killed_its_guard_and_agent() {
    assert_cleaned_up_after(KILL_BOTH, |_, _| {});
}

#[test]
fn the_next_agent_ends_a_job_that_removed_its_job_directory() {
    let attack = format!("rm -rf ~/../state/job-*; {STOP_ONE_AND_KILL_THE_OTHER}");
    assert_cleaned_up_after(&attack, |_, _| {});
}

#[test]
fn the_next_agent_cleans_up_without_control_groups() {
    if !can_switch_user() {
        return;
    }
    assert_cleaned_up_after(KILL_BOTH, |_, command| without_control_groups(command));
    assert_cleaned_up_after(KILL_BOTH, |world, command| as_user(world, OPERATOR, command));
}

#[test]
fn the_next_agent_ends_a_stopped_job_init() {
    assert_cleaned_up_after(STOP_ONE_AND_KILL_THE_OTHER, |_, _| {});
    if can_switch_user() {
        assert_cleaned_up_after(STOP_ONE_AND_KILL_THE_OTHER, |world, command| {
            as_user(world, OPERATOR, command);
        });
    }
}

#[test]
fn a_job_init_that_is_stopped_repeatedly_does_not_keep_the_job_alive() {
    /// The usual time for a teardown, and a reserve for a busy machine.
    const TEARDOWN: Duration = Duration::from_secs(25);
    let stops = "while kill -STOP $PPID 2>/dev/null; do :; done";
    let stops = stops.replace("$PPID", "\"$1\"");
    let stops = format!("setsid -f bash -c 'trap \"\" TERM HUP; {stops}' bash $PPID");
    for last in [RUN_UNTIL_GO, RUN_FOR_EVER] {
        let world = World::new();
        let _killed = KilledOnFailure(format!("HOME={}", world.home().display()));
        let agent = ServeAgent::start(&world);
        let (request, marker): (Value, String) = marked(job("1", &[&stops, last]));
        agent.post_job(&request).of_status(200);
        agent.wait_for_log("1", RUNNING);
        let began = Instant::now();
        if last == RUN_FOR_EVER {
            agent.post("/stop", b"").of_status(200);
        } else {
            fs::write(world.home().join("go"), "").unwrap();
        }
        agent.finish("1");
        assert!(began.elapsed() < TEARDOWN, "{last}: {:?}", began.elapsed());
        assert_eq!(processes_with(&marker), [""; 0], "{last}");
        assert_eq!(agent.run_to_end(&job("2", &["echo next"])).output(), "next\n");
    }
}
