//! A server that receives the callbacks of `agent serve`.

use std::io::{self, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use serde_json::Value;

use crate::http::Request;
use crate::waiting::PATIENCE;

/// A server on the loopback interface that receives callbacks.
pub struct CallbackServer {
    address: SocketAddr,
    count: Arc<AtomicUsize>,
    received: Mutex<mpsc::Receiver<Callback>>,
}

/// A received callback.
#[derive(Debug)]
pub struct Callback {
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub body: Value,
}

impl Callback {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(its, _)| its == name).map(|(_, value)| value.as_str())
    }
}

impl CallbackServer {
    pub fn start() -> Self {
        Self::answering(|_| 200)
    }

    /// Starts a server that responds with the status that `status` returns for the request's number, from 0
    /// on. [`Self::next`] can return the request before the response.
    pub fn answering(status: impl Fn(usize) -> u16 + Send + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let count = Arc::new(AtomicUsize::new(0));
        let (sender, received) = mpsc::channel();
        let counter = Arc::clone(&count);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                let mut reader = io::BufReader::new(stream);
                let Ok(request) = Request::read_from(&mut reader) else { continue };
                let body = serde_json::from_slice(&request.body).unwrap_or(Value::Null);
                let Request { method, path, headers, .. } = request;
                let number = counter.fetch_add(1, Ordering::SeqCst);
                let path = if method == "POST" { path } else { format!("{method} {path}") };
                if sender.send(Callback { path, headers, body }).is_err() {
                    return;
                }
                let answer = format!(
                    "HTTP/1.1 {} Answer\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                    status(number)
                );
                let _ = reader.get_mut().write_all(answer.as_bytes());
            }
        });
        Self { address, count, received: Mutex::new(received) }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Waits for the next request.
    pub fn next(&self) -> Callback {
        self.received.lock().unwrap().recv_timeout(PATIENCE).unwrap()
    }

    /// Fails if a request comes within 300 ms.
    pub fn assert_silent(&self) {
        let received = self.received.lock().unwrap().recv_timeout(Duration::from_millis(300));
        assert!(received.is_err(), "{received:?} came too early");
    }

    /// Returns the number of requests so far.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }
}
