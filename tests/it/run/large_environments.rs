//! Jobs with very many variables.

use actors::log::event::LogEvent;

use test_support::{Finished, World, job_of};

/// Returns the duration of the slowest command except the first one, in seconds.
fn slowest(finished: &Finished) -> u64 {
    let durations = finished.events.iter().filter_map(|event| match event {
        LogEvent::CmdFinished { directive, started_at, finished_at, .. } if directive == "true" => {
            Some(finished_at - started_at)
        }
        _ => None,
    });
    durations.max().unwrap()
}

/// When the cost grew with the number of variables, a command took a dozen seconds; now it takes less than
/// one.
#[test]
fn the_cost_of_a_command_does_not_depend_on_the_environments_size() {
    let many = "for ((i = 0; i < 40000; i++)); do export \"V$i=$i\"; done";
    let finished = World::new().run(&job_of(&[many, "true", "[[ $V39999 == 39999 ]]"]));
    assert_eq!(finished.result(), "passed", "{finished:?}");
    let seconds = slowest(&finished);
    assert!(seconds <= 4, "`true` took {seconds} s");
}
