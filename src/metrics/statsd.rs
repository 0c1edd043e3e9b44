//! Sends metrics to a DogStatsD server (docs/protocol.md: "StatsD").
//!
//! A thread resolves the server's address and sends the metrics, so that no job waits for it. Metrics that
//! come faster than they can be sent, or before the server is found, are dropped.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use actors::ports::MetricsSink;
use dogstatsd::{Client, OptionsBuilder};

/// How many measurements may wait for the sending thread; more are dropped.
const QUEUE: usize = 256;

/// The DogStatsD server, and the prefix of metric names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatsdConfig {
    /// The server's host name or IP address.
    pub host: String,
    /// The server's UDP port.
    pub port: u16,
    /// The first part of every metric's name.
    pub namespace: String,
}

/// Sends metrics to a DogStatsD server from a thread of its own.
pub struct StatsdSink {
    queue: SyncSender<Measurement>,
}

enum Measurement {
    Count { name: String, tag: String },
    Time { name: String, duration: Duration, tag: String },
}

impl StatsdSink {
    /// Starts the sending thread. The server's address is resolved there, at the first metric.
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
        // The name is resolved here once; the client would resolve it for every measurement.
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
        log::warn!(host, port; "can't resolve the metrics server's address");
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
    Client::new(options).inspect_err(|error| log::warn!(error:%; "can't send metrics")).ok()
}

/// Replaces the characters that have a meaning in a datagram: an image's name must not add metrics.
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
    fn datagrams_follow_the_protocol_and_tags_are_escaped() {
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
    fn excess_metrics_are_dropped_without_waiting() {
        let mut sink = sink(1);
        (0..100 * QUEUE).for_each(|_| sink.count("x", "t"));
    }
}
