//! Jobs with very many variables.

use actors::log::event::LogEvent;

use test_support::{Finished, World, job_of};

/// How many seconds the slowest command took, the first one not counted.
fn slowest(finished: &Finished) -> u64 {
    let durations = finished.events.iter().filter_map(|event| match event {
        LogEvent::CmdFinished { directive, started_at, finished_at, .. } if directive == "true" => {
            Some(finished_at - started_at)
        }
        _ => None,
    });
    durations.max().unwrap()
}

/// It took a dozen seconds when each variable cost something; it needs no second on a busy machine.
#[test]
fn a_command_costs_the_same_whatever_the_environments_size() {
    let many = "for ((i = 0; i < 40000; i++)); do export \"V$i=$i\"; done";
    let finished = World::new().run(&job_of(&[many, "true", "[[ $V39999 == 39999 ]]"]));
    assert_eq!(finished.result(), "passed", "{finished:?}");
    let seconds = slowest(&finished);
    assert!(seconds <= 4, "`true` took {seconds} s");
}
