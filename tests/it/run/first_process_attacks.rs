//! A job runs as the same user as its first process, the parent of its shell, and as the agent. It can kill
//! them, and stop them; it can not look into them, and nothing of it is left in the end.

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
    OPERATOR, as_user, has_other_users, in_shell, without_control_groups,
};
use test_support::{
    Finished, KilledOnFailure, RUN_FOR_EVER, RUN_UNTIL_GO, RUNNING, World, job, job_of, lives_with,
    marked, wait_for_end, wait_until,
};

/// Sets `$agent` in a job; its first process is `$PPID`.
const FIND_AGENT: &str = "agent=$(awk '/^PPid:/ {print $2}' /proc/$PPID/status)";

/// A job that tries to get at its first process and at the agent, and prints what it could do.
fn looking() -> String {
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

/// Fails if the job of [`looking`] got anywhere.
fn assert_blind(output: &str) {
    assert!(output.contains("job-init"), "its parent is another: {output}");
    if output.contains("no perl") {
        eprintln!("skipped: without perl nobody tries to attach");
    }
    let seen: Vec<_> = output.lines().filter(|line| line.contains(": ")).collect();
    assert!(seen.is_empty(), "{seen:#?}");
}

#[test]
fn a_served_job_can_not_look_into_its_first_process_or_the_agent() {
    if !has_other_users() {
        return;
    }
    let world = World::new();
    let agent = ServeAgent::start_with(&world, |command| as_user(&world, OPERATOR, command));
    assert_blind(&agent.run_to_end(&job("1", &[&looking()])).output());
}

#[test]
fn a_job_of_a_file_can_not_look_into_its_first_process_or_the_agent() {
    if !has_other_users() {
        return;
    }
    let world = World::new();
    let file = world.file("job.json", job_of(&[&looking()]));
    let mut agent = world.agent();
    agent.args(["run", "--output", "json"]).arg(file);
    as_user(&world, OPERATOR, &mut agent);
    let agent = spawned(agent.stdout(Stdio::piped()).stderr(Stdio::piped()));
    assert_blind(&Finished::of(&wait_for_end(agent)).output());
}

/// A number that a job has written.
fn number_in(world: &World, name: &str) -> Pid {
    let path = world.home().join(name);
    let read = || fs::read_to_string(&path).ok()?.trim().parse().ok();
    wait_until(|| read().is_some(), || format!("there is no number in {name}"));
    Pid::from_raw(read().unwrap())
}

#[test]
fn the_first_process_holds_nothing_of_the_agents_own_output() {
    if !has_other_users() {
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
fn memory_is_taken_from_the_job_first_and_from_its_first_moment_on() {
    let look = "cat /proc/$$/oom_score_adj";
    let surroundings: [fn(&World, &mut Command); 3] = [
        |_, _| {},
        |_, command| in_shell(command, "echo 77 > /proc/self/oom_score_adj"),
        |world, command| {
            in_shell(command, "echo 77 > /proc/self/oom_score_adj");
            if has_other_users() {
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
        assert_eq!(at_first, "500\n", "its login profile runs already");
    }
}

/// Whether a process has ended, waited for or not.
fn is_gone(process: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"));
    stat.map_or(true, |stat| {
        let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
        state.is_none_or(|state| state.starts_with(['Z', 'X']))
    })
}

/// Has a job bring down its first process and its agent in this way, and sees to it that the next agent, in the
/// same surroundings, leaves nothing of it.
fn assert_cleaned_up_after(attack: &str, surroundings: fn(&World, &mut Command)) {
    let world = World::new();
    // Also what has no variable of the job: nothing is left even if this test fails.
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
    let left = || (is_gone(sleeper), is_gone(first), lives_with(&marker), job_directories(&world));
    let nothing = (true, true, Vec::new(), Vec::new());
    wait_until(|| left() == nothing, || format!("left after {attack}: {:?}", left()));
    assert_eq!(agent.run_to_end(&job("2", &["echo next"])).output(), "next\n");
}

/// What the agent keeps about jobs, alive or dead.
fn job_directories(world: &World) -> Vec<String> {
    let names = fs::read_dir(world.state()).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains("job-")).collect()
}

/// All at once.
const KILL_BOTH: &str = "kill -STOP $agent; kill -9 $PPID $agent";

/// The one who would clean up can't.
const STOP_ONE_AND_KILL_THE_OTHER: &str = "kill -STOP $PPID; kill -9 $agent";

#[test]
fn the_next_agent_ends_what_a_job_has_left_that_killed_all_above_it() {
    assert_cleaned_up_after(KILL_BOTH, |_, _| {});
}

#[test]
fn the_next_agent_ends_a_job_that_has_removed_all_that_was_kept_about_it() {
    let attack = format!("rm -rf ~/../state/job-*; {STOP_ONE_AND_KILL_THE_OTHER}");
    assert_cleaned_up_after(&attack, |_, _| {});
}

#[test]
fn the_next_agent_does_so_without_control_groups_too() {
    if !has_other_users() {
        return;
    }
    assert_cleaned_up_after(KILL_BOTH, |_, command| without_control_groups(command));
    assert_cleaned_up_after(KILL_BOTH, |world, command| as_user(world, OPERATOR, command));
}

#[test]
fn the_next_agent_ends_a_first_process_that_the_job_has_stopped() {
    assert_cleaned_up_after(STOP_ONE_AND_KILL_THE_OTHER, |_, _| {});
    if has_other_users() {
        assert_cleaned_up_after(STOP_ONE_AND_KILL_THE_OTHER, |world, command| {
            as_user(world, OPERATOR, command);
        });
    }
}

#[test]
fn a_first_process_that_is_stopped_again_and_again_does_not_keep_the_job_alive() {
    /// As long as it may take, and some time for a busy machine.
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
        assert_eq!(lives_with(&marker), [""; 0], "{last}");
        assert_eq!(agent.run_to_end(&job("2", &["echo next"])).output(), "next\n");
    }
}
