//! Time limits for connections, and the number of connections of one client: no client can shut out others by
//! holding connections.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::process::Command;
use std::time::Duration;

use openssl::ssl::SslStream;
use tokio::time::Instant;

use test_support::http::{Answer, encode_request};
use test_support::serve::{ServeAgent, good_authorization};
use test_support::surroundings::in_shell;
use test_support::{World, job, wait_until};

/// Time limit for a request's headers, and a reserve for a busy machine.
const HEADERS: Duration = Duration::from_secs(20);

/// Time for which a refused client may continue to send its body, and a reserve for a busy machine.
const REFUSED: Duration = Duration::from_secs(30);

/// Time limit for an immediate response.
const SOON: Duration = Duration::from_secs(10);

/// Pause between two bytes of a slow client.
const PAUSE: Duration = Duration::from_secs(2);

/// A kept-alive connection.
struct Kept(BufReader<SslStream<TcpStream>>);

impl Kept {
    fn new(agent: &ServeAgent) -> Self {
        Self(BufReader::new(agent.connect()))
    }

    /// Opens a connection and completes one request on it.
    fn used(agent: &ServeAgent) -> Self {
        let mut kept = Self::new(agent);
        assert_eq!(kept.ask().unwrap().text(), "yes");
        kept
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.get_mut().write_all(bytes)
    }

    fn answer(&mut self) -> io::Result<Answer> {
        self.0.get_ref().get_ref().set_read_timeout(Some(REFUSED))?;
        Answer::read_from(&mut self.0, "GET")
    }

    fn ask(&mut self) -> io::Result<Answer> {
        self.send(&encode_request("GET", "/is_alive", &[], b""))?;
        self.answer()
    }

    /// Returns whether the agent keeps the connection open for this time.
    fn stays_open_for(&mut self, time: Duration) -> bool {
        let began = Instant::now();
        loop {
            let left = time.saturating_sub(began.elapsed()).max(Duration::from_millis(1));
            self.0.get_ref().get_ref().set_read_timeout(Some(left)).unwrap();
            match self.0.read(&mut [0; 1000]) {
                // The agent may send a response with the reason first.
                Ok(1..) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
                Ok(0) | Err(_) => return false,
            }
        }
    }

    /// Sends `next` repeatedly with pauses. Returns the time until the connection was closed, at most
    /// `patience`.
    fn time_of_end(
        &mut self,
        patience: Duration,
        mut next: impl FnMut() -> Option<Vec<u8>>,
    ) -> Option<Duration> {
        let began = Instant::now();
        while began.elapsed() < patience {
            let sent = next().map_or(Ok(()), |bytes| self.send(&bytes));
            if sent.is_err() || !self.stays_open_for(PAUSE) {
                return Some(began.elapsed());
            }
        }
        None
    }
}

#[test]
fn each_request_on_a_kept_connection_must_come_in_time() {
    let agent = ServeAgent::start(&World::new());
    let request = encode_request("GET", "/is_alive", &[("X-Filler", &"x".repeat(200))], b"");
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| {
            let mut bytes = request.iter().map(|byte| vec![*byte]);
            Kept::used(&agent).time_of_end(HEADERS, || bytes.next())
        });
        let unfinished = scope.spawn(|| {
            let mut beginning = Some(request[..50].to_vec());
            Kept::used(&agent).time_of_end(HEADERS, || beginning.take())
        });
        // The time limit applies to each request, not to the age of the connection.
        let not_so_slow = scope.spawn(|| {
            let mut kept = Kept::used(&agent);
            for _ in 0..4 {
                let (first, last) = request.split_at(30);
                kept.send(first).unwrap();
                assert!(kept.stays_open_for(Duration::from_secs(4)), "closed too early");
                kept.send(last).unwrap();
                assert_eq!(kept.answer().unwrap().text(), "yes");
            }
        });
        let idle = scope.spawn(|| {
            let mut kept = Kept::used(&agent);
            assert!(kept.stays_open_for(Duration::from_secs(12)), "an idle connection was closed");
            assert_eq!(kept.ask().unwrap().text(), "yes");
        });
        not_so_slow.join().unwrap();
        idle.join().unwrap();
        let ends = [slow, unfinished].map(|client| client.join().unwrap());
        assert!(ends.iter().all(Option::is_some), "byte by byte, and half a request: {ends:?}");
    });
}

#[test]
fn a_refused_client_can_not_send_its_body_for_long() {
    let agent = ServeAgent::start(&World::new());
    let chunked = ("Transfer-Encoding", "chunked");
    let long = ("Content-Length", "1000000");
    let mut cases: Vec<Case> = Vec::new();
    for (method, path) in [("POST", "/jobs"), ("POST", "/stop"), ("GET", "/status")] {
        for (framing, part) in [(chunked, "1\r\nx\r\n"), (long, "x")] {
            cases.push((method, path, framing, part, true));
            cases.push((method, path, framing, part, false));
        }
    }
    let still_open = |(method, path, framing, part, goes_on): &Case| {
        let mut kept = Kept::new(&agent);
        let (name, value) = framing;
        let head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{name}: {value}\r\n");
        kept.send(format!("{head}\r\n{part}").as_bytes()).unwrap();
        kept.answer().unwrap().of_status(401);
        let end = kept.time_of_end(REFUSED, || goes_on.then(|| (*part).into()));
        end.is_none().then(|| format!("{method} {path} {name}, going on: {goes_on}"))
    };
    let left: Vec<_> = std::thread::scope(|scope| {
        let clients: Vec<_> = cases.iter().map(|case| scope.spawn(|| still_open(case))).collect();
        clients.into_iter().filter_map(|client| client.join().unwrap()).collect()
    });
    assert!(left.is_empty(), "still open {REFUSED:?} after the response: {left:#?}");
}

/// Method, path, body header, a part of the body, and whether more such parts follow.
type Case = (&'static str, &'static str, (&'static str, &'static str), &'static str, bool);

/// Opens a connection from this address, and completes one request on it.
fn held(agent: &ServeAgent, address: Ipv4Addr) -> io::Result<Kept> {
    let mut kept = Kept(BufReader::new(agent.connect_from(address)?));
    kept.0.get_ref().get_ref().set_read_timeout(Some(SOON))?;
    kept.send(&encode_request("GET", "/is_alive", &[], b""))?;
    Answer::read_from(&mut kept.0, "GET")?;
    Ok(kept)
}

#[test]
fn the_connections_of_one_client_are_limited() {
    const ONE: Ipv4Addr = Ipv4Addr::LOCALHOST;
    const OTHER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
    let ways: [fn(&World, &mut Command); 3] = [
        |_, command| {
            command.args(["--max-connections-per-client", "3"]);
        },
        |_, command| {
            command.env("SEMAPHORE_AGENT_MAX_CONNECTIONS_PER_CLIENT", "3");
        },
        |world, command| {
            let file = world.file("config.yaml", "max-connections-per-client: 3\n");
            command.arg("--config-file").arg(file);
        },
    ];
    for way in ways {
        let world = World::new();
        let agent = ServeAgent::start_with(&world, |command| way(&world, command));
        let mut first: Vec<_> = (0..3).map(|_| held(&agent, ONE).unwrap()).collect();
        let asked_at = Instant::now();
        assert!(held(&agent, ONE).is_err(), "a fourth connection was accepted");
        assert!(asked_at.elapsed() < SOON, "neither refused nor closed");
        let others: Vec<_> = (0..3).map(|_| held(&agent, OTHER).unwrap()).collect();
        for kept in &mut first {
            assert_eq!(kept.ask().unwrap().text(), "yes", "existing connections must still work");
        }
        // When a connection ends, another may be opened.
        first.pop();
        let mut again = None;
        let mut comes = || {
            again = held(&agent, ONE).ok();
            again.is_some()
        };
        wait_until(&mut comes, || "the place of a connection that ended stays taken".into());
        assert!(held(&agent, ONE).is_err(), "a fourth connection was accepted");
        drop((first, again, others));
    }
}

/// More connections than an agent from [`small`] can hold.
const MANY: usize = 150;

/// Starts an agent with a low limit of open files, and a job with a long log.
fn small(world: &World) -> ServeAgent {
    let agent = ServeAgent::start_with(world, |command| in_shell(command, "ulimit -n 128"));
    let long = "head -c 20000000 /dev/zero | tr '\\0' x | fold -w 1000";
    assert_eq!(agent.run_to_end(&job("1", &[long])).result(), "passed");
    agent
}

/// Two connections in use: one sends a job, the other reads a log.
struct Active {
    sends: Kept,
    takes: Kept,
    unsent: Vec<u8>,
}

impl Active {
    fn start(agent: &ServeAgent) -> Self {
        let authorization = [("Authorization", good_authorization())];
        let mut takes = Kept::new(agent);
        takes.send(&encode_request("GET", "/jobs/1/log", &authorization, b"")).unwrap();
        // Wait until the response begins.
        takes.0.get_ref().get_ref().set_read_timeout(Some(SOON)).unwrap();
        assert!(!takes.0.fill_buf().unwrap().is_empty());
        let mut sends = Kept::new(agent);
        let body = format!("{}{}", job("2", &["echo sent"]), " ".repeat(2 * MANY));
        let request = encode_request("POST", "/jobs", &authorization, body.as_bytes());
        let (sent, unsent) = request.split_at(request.len() - 2 * MANY);
        sends.send(sent).unwrap();
        Self { sends, takes, unsent: unsent.to_vec() }
    }

    /// Sends one more byte.
    fn go_on(&mut self) {
        let byte = self.unsent.remove(0);
        self.sends.send(&[byte]).unwrap();
    }

    fn assert_completes(mut self, agent: &ServeAgent) {
        let log = self.takes.answer().unwrap();
        let log = log.of_status(200).text();
        assert!(log.ends_with('\n') && log.contains("job_finished"), "{} bytes", log.len());
        let unsent = std::mem::take(&mut self.unsent);
        self.sends.send(&unsent).unwrap();
        assert_eq!(self.sends.answer().unwrap().of_status(200).message(), "ok");
        assert_eq!(agent.finish("2").output(), "sent\n");
    }
}

/// Asserts that the agent logs that it is full, but not repeatedly.
fn assert_logs_that_it_is_full(agent: &ServeAgent) {
    let log = agent.own_log();
    let is_about_limit = |line: &&str| {
        line.contains(" WARN ") && (line.contains("connections") || line.contains("full"))
    };
    let lines: Vec<_> = log.lines().filter(is_about_limit).collect();
    assert!((1..=3).contains(&lines.len()), "{} lines: {log}", lines.len());
}

#[test]
fn idle_connections_make_room_for_new_ones() {
    let world = World::new();
    let agent = small(&world);
    let mut active = Active::start(&agent);
    let mut idle = Vec::new();
    for number in 0..MANY {
        active.go_on();
        let kept = held(&agent, Ipv4Addr::LOCALHOST);
        idle.push(
            kept.unwrap_or_else(|error| panic!("connection {number} gets no response: {error}")),
        );
    }
    // The connection that was idle for the longest time was closed first.
    assert!(!idle[0].stays_open_for(Duration::ZERO));
    assert_eq!(idle.last_mut().unwrap().ask().unwrap().text(), "yes");
    active.assert_completes(&agent);
    assert_logs_that_it_is_full(&agent);
}

#[test]
fn connections_without_a_handshake_shut_out_nobody() {
    let world = World::new();
    let agent = small(&world);
    let mut active = Active::start(&agent);
    let silent: Vec<_> = (0..MANY)
        .map(|_| {
            active.go_on();
            TcpStream::connect(agent.address()).unwrap()
        })
        .collect();
    for _ in 0..3 {
        active.go_on();
        let asked_at = Instant::now();
        held(&agent, Ipv4Addr::LOCALHOST).unwrap();
        assert!(asked_at.elapsed() < SOON, "{:?}", asked_at.elapsed());
    }
    active.assert_completes(&agent);
    assert_logs_that_it_is_full(&agent);
    drop(silent);
}
