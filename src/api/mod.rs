//! The HTTPS API of `agent serve` (docs/protocol.md: "The hosted API"): actix-web on one side,
//! messages to the intake on the other; no state of its own.

mod admission;
pub mod auth;
mod connection;
mod refusals;
mod routes;
pub mod tls;
mod transfer;

use std::io;
use std::net::TcpListener;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use actix::Addr;
use actix_http::{HttpService, KeepAlive};
use actix_server::{Server, ServerHandle};
use actix_service::{IntoServiceFactory as _, ServiceFactoryExt as _, fn_service, map_config};
use actix_web::dev::AppConfig;
use actors::intake::http::HttpIntake;
use openssl::ssl::Ssl;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_openssl::SslStream;

use self::admission::{Admission, Admitted};
use self::auth::Auth;
use self::connection::Connection;
pub(crate) use self::refusals::Refusals;
pub use self::routes::ROUTES;
use crate::api::tls::Tls;

/// Threads that serve connections: one would let a large body hold up everybody else.
const WORKERS: usize = 2;

/// How long a client may take for its part of the handshake, and for a request's headers.
const FIRST_BYTES: Duration = Duration::from_secs(10);

/// How many more the server may accept than are admitted: those are closed at once.
const SPARE_CONNECTIONS: usize = 32;

/// How long a connection without a request is kept.
const KEEP_ALIVE: Duration = Duration::from_secs(75);

/// How long a client that is refused may go on sending before it is cut off.
const LINGER: Duration = Duration::from_secs(2);

/// How long answers that are under way have at the end, in seconds.
const LAST_ANSWERS: u64 = 30;

/// How many files may be open for the job, for callbacks and for the agent's log.
const FILES_OF_A_JOB: u64 = 256;

/// The first byte of a TLS connection: a handshake record.
const TLS_HANDSHAKE: u8 = 0x16;

/// What the API needs.
pub struct Api {
    /// Who answers for jobs.
    pub intake: Addr<HttpIntake>,
    /// Who may use it.
    pub auth: Auth,
    /// The largest body of a request, in bytes.
    pub max_body_size: usize,
    /// The agent's own log, if it is in a file.
    pub agent_log: Option<PathBuf>,
    /// How many files the agent may have open.
    pub open_files: u64,
    /// Requests that were refused of late.
    pub(crate) refusals: Refusals,
    /// How many connections one address may have, if not as many as there can be.
    pub connections_per_client: Option<usize>,
}

/// Serves the API on `listener` until the handle stops it.
pub fn serve(listener: TcpListener, tls: Arc<Tls>, api: Api) -> io::Result<(Server, ServerHandle)> {
    let address = listener.local_addr()?;
    let builder = Server::build().workers(WORKERS).disable_signals().shutdown_timeout(LAST_ANSWERS);
    let most = connections(api.open_files);
    let admission = Admission::new(most, api.connections_per_client.unwrap_or(usize::MAX));
    // Whoever admits them decides, not the server's order of accepting them.
    let builder = builder.max_concurrent_connections(most + SPARE_CONNECTIONS);
    let api = actix_web::web::Data::new(api);
    let ending = builder.graceful_shutdown_signal();
    let server = builder.listen("api", listener, move || {
        let (tls, admission) = (Arc::clone(&tls), Arc::clone(&admission));
        let ending = ending.clone();
        let app = routes::app(api.clone(), ending.clone()).into_factory();
        let at_handshake = ending.clone();
        let http = HttpService::build()
            .keep_alive(KeepAlive::Timeout(KEEP_ALIVE))
            .client_request_timeout(FIRST_BYTES)
            .client_disconnect_timeout(LINGER)
            .secure()
            .local_addr(address)
            .graceful_shutdown_signal(move || {
                let ending = ending.clone();
                async move { ending.notified().await }
            })
            .on_connect_ext(|connection: &Connection, data| {
                data.insert(connection.handover());
            })
            .h1(map_config(app, |()| AppConfig::default()));
        fn_service(move |tcp: TcpStream| {
            let (tls, admission) = (Arc::clone(&tls), Arc::clone(&admission));
            let ending = at_handshake.clone();
            async move {
                let peer = tcp.peer_addr().ok();
                let Some(admitted) = admission.admit(peer.map(|peer| peer.ip())) else {
                    return Err(());
                };
                let place = Arc::clone(admitted.place());
                let handshake = tokio::select! {
                    shaken = timeout(FIRST_BYTES, shake_hands(tcp, &tls, admitted)) => shaken,
                    () = place.evicted() => Ok(Err(io::ErrorKind::ConnectionAborted.into())),
                    () = ending.notified() => Ok(Err(io::ErrorKind::ConnectionAborted.into())),
                };
                match handshake.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                    Ok(connection) => Ok((connection, peer)),
                    Err(error) => {
                        log::debug!(peer:?, error:%; "a connection was not established");
                        Err(())
                    }
                }
            }
        })
        .and_then(
            http.map_err(|error| log::debug!(error:%; "a connection broke")).map_init_err(|()| ()),
        )
    })?;
    let server = server.run();
    let handle = server.handle();
    Ok((server, handle))
}

/// How many connections there may be at once. Each may have a log open; the rest is for the job.
fn connections(open_files: u64) -> usize {
    let rest = (open_files - FILES_OF_A_JOB.min(open_files / 2)) / 2;
    usize::try_from(rest).unwrap_or(usize::MAX).max(WORKERS)
}

async fn shake_hands(mut tcp: TcpStream, tls: &Tls, admitted: Admitted) -> io::Result<Connection> {
    tcp.set_nodelay(true)?;
    let mut first = [0];
    if tcp.peek(&mut first).await? == 1 && first[0] != TLS_HANDSHAKE {
        let message = r#"{"message":"this is an HTTPS server: use https:"}"#;
        let answer = format!(
            "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{message}",
            message.len()
        );
        tcp.write_all(answer.as_bytes()).await?;
        return Err(io::Error::new(io::ErrorKind::InvalidData, "is not TLS"));
    }
    let ssl = Ssl::new(tls.acceptor().context())?;
    let mut stream = SslStream::new(ssl, tcp)?;
    Pin::new(&mut stream).accept().await.map_err(io::Error::other)?;
    Ok(Connection::new(stream, admitted))
}
