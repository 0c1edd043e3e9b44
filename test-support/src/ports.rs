//! Ports for programs that must be told theirs.

use std::net::TcpListener;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::SystemTime;

/// Ports below those that the system gives out by itself, so that nobody gets one between the check and its use.
const PORTS: std::ops::Range<u16> = 10_000..32_000;

/// Returns a port that is free on the loopback interface. Each call in this process returns another one.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    // Another test program may run at the same time.
    let first = u16::try_from(now.subsec_micros() % u32::from(PORTS.end - PORTS.start)).unwrap();
    let _ = NEXT.compare_exchange(0, PORTS.start + first, Ordering::Relaxed, Ordering::Relaxed);
    let candidates = std::iter::repeat_with(|| NEXT.fetch_add(1, Ordering::Relaxed));
    let in_range = candidates.map(|port| PORTS.start + port % (PORTS.end - PORTS.start));
    in_range.take(PORTS.len()).find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).unwrap()
}
