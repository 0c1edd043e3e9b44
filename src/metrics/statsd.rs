//! Sends metrics to a DogStatsD server (docs/protocol.md: "StatsD").
//!
//! On a thread of its own: finding the server's address may take long, and a job must not wait for
//! it. What comes faster than it can be sent, or before the server is found, is dropped.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use actors::ports::MetricsSink;
use dogstatsd::{Client, OptionsBuilder};

/// How many measurements may wait.
const QUEUE: usize = 256;

/// Where the server is, and what its metrics begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatsdConfig {
    /// A name or an address.
    pub host: String,
    /// Its UDP port.
    pub port: u16,
    /// The first part of every metric's name.
    pub namespace: String,
}

/// See the module.
pub struct StatsdSink {
    queue: SyncSender<Measurement>,
}

enum Measurement {
    Count { name: String, tag: String },
    Time { name: String, duration: Duration, tag: String },
}

impl StatsdSink {
    /// A sink that looks for its server in the background.
    pub fn new(config: StatsdConfig) -> std::io::Result<Self> {
        let (queue, measurements) = sync_channel(QUEUE);
        let thread = std::thread::Builder::new().name("statsd".into());
        thread.spawn(move || send_all(&config, &measurements))?;
        Ok(Self { queue })
    }
}

fn send_all(config: &StatsdConfig, measurements: &Receiver<Measurement>) {
    let mut client = None;
    for measurement in measurements {
        // Asked for once: the client would ask for a name at every single measurement.
        if client.is_none() {
            client = connect(config);
        }
        let Some(client) = &client else {
            continue;
        };
        let sent = match measurement {
            Measurement::Count { name, tag } => client.incr(name, [tag]),
            Measurement::Time { name, duration, tag } => {
                let ms = i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
                client.timing(name, ms, [tag])
            }
        };
        if let Err(error) = sent {
            log::debug!(error:%; "a measurement was not sent");
        }
    }
}

fn connect(config: &StatsdConfig) -> Option<Client> {
    let StatsdConfig { host, port, namespace } = config;
    let found = (host.as_str(), *port).to_socket_addrs().map(|mut found| found.next());
    let Ok(Some(server)) = found else {
        log::warn!(host, port; "the metrics server is not found");
        return None;
    };
    let from = match server {
        SocketAddr::V4(_) => "0.0.0.0:0",
        SocketAddr::V6(_) => "[::]:0",
    };
    let options = OptionsBuilder::new()
        .from_addr(from.to_owned())
        .to_addr(server.to_string())
        .namespace(namespace.clone())
        .build();
    Client::new(options).inspect_err(|error| log::warn!(error:%; "no metrics can be sent")).ok()
}

/// Takes out what has a meaning in a datagram, so that an image's name can't add metrics.
fn without_syntax(text: &str) -> String {
    text.replace(|c: char| c.is_control() || matches!(c, '|' | ',' | '#' | '@'), "_")
}

impl MetricsSink for StatsdSink {
    fn count(&mut self, name: &str, tag: &str) {
        let tag = without_syntax(tag);
        let _ = self.queue.try_send(Measurement::Count { name: name.to_owned(), tag });
    }

    fn time(&mut self, name: &str, duration: Duration, tag: &str) {
        let tag = without_syntax(tag);
        let _ = self.queue.try_send(Measurement::Time { name: name.to_owned(), duration, tag });
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    fn sink(port: u16) -> StatsdSink {
        let namespace = "agent.test".to_owned();
        StatsdSink::new(StatsdConfig { host: "localhost".into(), port, namespace }).unwrap()
    }

    #[test]
    fn datagrams_are_those_of_the_protocol_and_tags_can_not_break_out() {
        let server = UdpSocket::bind(("localhost", 0)).unwrap();
        let mut sink = sink(server.local_addr().unwrap().port());
        let mut datagram = [0; 200];
        let mut next = || {
            let length = server.recv(&mut datagram).unwrap();
            String::from_utf8(datagram[..length].to_vec()).unwrap()
        };
        sink.time("compose_ci.docker_pull.duration", Duration::from_millis(1500), "image:ruby");
        assert_eq!(next(), "agent.test.compose_ci.docker_pull.duration:1500|ms|#image:ruby");
        sink.count("compose_ci.docker_pull.success.rate", "image:a|c\nx:1|c,b");
        assert_eq!(next(), "agent.test.compose_ci.docker_pull.success.rate:1|c|#image:a_c_x:1_c_b");
    }

    #[test]
    fn a_flood_is_dropped_rather_than_waited_for() {
        let mut sink = sink(1);
        (0..100 * QUEUE).for_each(|_| sink.count("x", "t"));
    }
}
