//! The HTTPS API of `agent serve` (docs/protocol.md: "The hosted API"): translates between actix-web
//! and messages to the intake, and holds no state of jobs.

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

/// Threads that serve connections. More than one, so that a large body does not hold up all other clients.
const WORKERS: usize = 2;

/// Time limit for the TLS handshake, and again for the headers of the connection's first request.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(10);

/// How many connections the server may accept beyond the limit of [`Admission`], which closes them at once or
/// evicts others.
const SPARE_CONNECTIONS: usize = 32;

/// How long an idle connection is kept open.
const KEEP_ALIVE: Duration = Duration::from_secs(75);

/// How long a client may go on sending after the last response before the connection is cut.
const LINGER: Duration = Duration::from_secs(2);

/// Time limit for responses that are being sent when the server stops, in seconds.
const SHUTDOWN_PATIENCE: u64 = 30;

/// File descriptors reserved for the job, for callbacks and for the agent's log.
const FILES_OF_A_JOB: u64 = 256;

/// The first byte of every TLS connection: the type of a handshake record.
const TLS_HANDSHAKE: u8 = 0x16;

/// The state that all requests share.
pub struct Api {
    /// The actor that takes jobs, stops them and returns their logs.
    pub intake: Addr<HttpIntake>,
    /// Checks the tokens of requests.
    pub auth: Auth,
    /// Limit for the body of a request, in bytes.
    pub max_body_size: usize,
    /// The file of the agent's own log, if it has one.
    pub agent_log: Option<PathBuf>,
    /// The agent's limit of open file descriptors.
    pub open_files: u64,
    /// Limits the log lines of refused requests.
    pub(crate) refusals: Refusals,
    /// Limit for the connections of one address, in addition to the limit for all.
    pub connections_per_client: Option<usize>,
}

/// Serves the API on `listener` until the handle stops it.
pub fn serve(listener: TcpListener, tls: Arc<Tls>, api: Api) -> io::Result<(Server, ServerHandle)> {
    let address = listener.local_addr()?;
    let builder =
        Server::build().workers(WORKERS).disable_signals().shutdown_timeout(SHUTDOWN_PATIENCE);
    let most = max_connections(api.open_files);
    let admission = Admission::new(most, api.connections_per_client.unwrap_or(usize::MAX));
    // The server's own limit must stay out of reach: it would let new connections wait instead of evicting
    // idle ones.
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
            .client_request_timeout(HANDSHAKE_PATIENCE)
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
                let slot = Arc::clone(admitted.slot());
                let handshake = tokio::select! {
                    result = timeout(HANDSHAKE_PATIENCE, shake_hands(tcp, &tls, admitted)) => result,
                    () = slot.evicted() => Ok(Err(io::ErrorKind::ConnectionAborted.into())),
                    () = ending.notified() => Ok(Err(io::ErrorKind::ConnectionAborted.into())),
                };
                match handshake.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                    Ok(connection) => Ok((connection, peer)),
                    Err(error) => {
                        log::debug!(peer:?, error:%; "TLS handshake failed");
                        Err(())
                    }
                }
            }
        })
        .and_then(
            http.map_err(|error| log::debug!(error:%; "connection failed")).map_init_err(|()| ()),
        )
    })?;
    let server = server.run();
    let handle = server.handle();
    Ok((server, handle))
}

/// Returns the limit of connections. Each one takes two descriptors: its socket, and a log that it sends.
fn max_connections(open_files: u64) -> usize {
    let rest = (open_files - FILES_OF_A_JOB.min(open_files / 2)) / 2;
    usize::try_from(rest).unwrap_or(usize::MAX).max(WORKERS)
}

async fn shake_hands(mut tcp: TcpStream, tls: &Tls, admitted: Admitted) -> io::Result<Connection> {
    tcp.set_nodelay(true)?;
    let mut first = [0];
    if tcp.peek(&mut first).await? == 1 && first[0] != TLS_HANDSHAKE {
        let message = r#"{"message":"this is an HTTPS server: use https:"}"#;
        let response = format!(
            "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{message}",
            message.len()
        );
        tcp.write_all(response.as_bytes()).await?;
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a TLS handshake"));
    }
    let ssl = Ssl::new(tls.acceptor().context())?;
    let mut stream = SslStream::new(ssl, tcp)?;
    Pin::new(&mut stream).accept().await.map_err(io::Error::other)?;
    Ok(Connection::new(stream, admitted))
}
