//! A peer that closes the connection without a response: the agent's log says exactly that.

use std::fs;
use std::io::Read as _;
use std::net::{Ipv4Addr, TcpListener};

use serde_json::json;

use test_support::control_plane::{Fault, ReceivedRequest};
use test_support::serve::ServeAgent;
use test_support::start::{Hub, SOON, StartAgent};
use test_support::{RUN_UNTIL_GO, RUNNING, World, job};

#[test]
fn a_connection_closed_by_the_log_server_is_logged_as_closed() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let agent = StartAgent::start(&world, &hub);
    let id = hub.queue(job("1", &[RUN_UNTIL_GO]));
    hub.wait_for_log(&id, RUNNING);
    hub.fail(Fault::Drop, ReceivedRequest::is_log);
    fs::write(world.home().join("go"), "").unwrap();
    let own_log = agent.wait_for_own_log("the log server did not accept a batch; retrying");
    assert_logged_as_closed(&own_log, "the log server did not accept a batch");
}

#[test]
fn a_connection_closed_by_the_control_plane_is_logged_as_closed() {
    let hub = Hub::start(SOON);
    let world = World::new();
    let agent = StartAgent::start(&world, &hub);
    hub.wait_for_state("waiting-for-jobs");
    hub.fail(Fault::Drop, |received| received.is("POST", "/sync"));
    let own_log = agent.wait_for_own_log("the report to the control plane failed");
    assert_logged_as_closed(&own_log, "the report to the control plane failed");
}

fn assert_logged_as_closed(own_log: &str, what: &str) {
    let line = own_log.lines().find(|line| line.contains(what)).unwrap();
    assert!(line.contains("closed") && !line.contains("Internal error"), "{line}");
    assert!(!line.contains("connector"), "{line}");
}

#[test]
fn a_connection_closed_by_a_callback_receiver_is_logged_as_closed() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let url = format!("http://{}/finished", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().filter_map(Result::ok) {
            // Read the request, so that the connection is closed and not reset.
            let _ = stream.read(&mut [0; 4096]);
        }
    });
    let agent = ServeAgent::start(&World::new());
    let mut request = job("1", &["true"]);
    request["callbacks"] = json!({ "finished": url });
    agent.post_job(&request).of_status(200);
    let own_log = agent.wait_for_own_log("the callback failed");
    assert_logged_as_closed(&own_log, "the callback failed");
}
