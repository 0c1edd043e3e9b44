//! Relays connections from a Unix socket in a private directory to an engine that needs TLS. Everything else
//! connects to the socket, and needs no TLS of its own.

use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;

use openssl::ssl::{SslConnector, SslFiletype, SslMethod};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio_openssl::SslStream;

/// A running relay. Dropping it closes the socket; open connections go on.
#[derive(Debug)]
pub(super) struct TlsRelay {
    /// The path of the socket.
    pub(super) socket: PathBuf,
    listening: JoinHandle<()>,
}

impl TlsRelay {
    /// Starts a relay to `engine` (`HOST:PORT`). Its socket is in `directory`, which is created if needed.
    ///
    /// `certificates` is laid out as `docker` expects of `DOCKER_CERT_PATH`: `ca.pem`, and optionally
    /// `cert.pem` with `key.pem`.
    pub(super) fn start(engine: &str, certificates: &Path, directory: &Path) -> io::Result<Self> {
        let connector = connector(certificates)?;
        match std::fs::DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let socket = directory.join("engine.sock");
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)?;
        let engine = engine.to_owned();
        let listening = actix::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let (engine, connector) = (engine.clone(), connector.clone());
                actix::spawn(async move {
                    if let Err(error) = relay(near, &engine, &connector).await {
                        log::warn!(engine, error:%; "a connection to the engine failed");
                    }
                });
            }
        });
        Ok(Self { socket, listening })
    }
}

impl Drop for TlsRelay {
    fn drop(&mut self) {
        self.listening.abort();
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn connector(certificates: &Path) -> io::Result<SslConnector> {
    let named = |path: PathBuf| {
        move |error: openssl::error::ErrorStack| {
            io::Error::other(format!("{}: {error}", path.display()))
        }
    };
    let [ca, certificate, key] =
        ["ca.pem", "cert.pem", "key.pem"].map(|name| certificates.join(name));
    let mut tls = SslConnector::builder(SslMethod::tls_client())?;
    tls.set_ca_file(&ca).map_err(named(ca))?;
    if certificate.exists() {
        tls.set_certificate_chain_file(&certificate).map_err(named(certificate))?;
        tls.set_private_key_file(&key, SslFiletype::PEM).map_err(named(key))?;
    }
    Ok(tls.build())
}

async fn relay(mut near: UnixStream, engine: &str, connector: &SslConnector) -> io::Result<()> {
    let stream = TcpStream::connect(engine).await?;
    stream.set_nodelay(true)?;
    let host = engine.rsplit_once(':').map_or(engine, |(host, _)| host);
    let tls = connector.configure()?.into_ssl(host.trim_matches(['[', ']']))?;
    let mut far = SslStream::new(tls, stream)?;
    Pin::new(&mut far).connect().await.map_err(io::Error::other)?;
    // An error means that one side closed the connection, which is a normal end.
    let _ = copy_bidirectional(&mut near, &mut far).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use openssl::asn1::Asn1Time;
    use openssl::ec::{EcGroup, EcKey};
    use openssl::hash::MessageDigest;
    use openssl::nid::Nid;
    use openssl::pkey::PKey;
    use openssl::ssl::{Ssl, SslAcceptor, SslVerifyMode};
    use openssl::x509::{X509, X509Name};
    use tokio::net::TcpListener;

    use actors::errors::WithCauses;

    use super::*;
    use crate::api::tls::{PairSource, Tls};
    use crate::executors::docker::engine::Engine;

    /// Creates a self-signed server certificate for localhost; returns the paths of certificate and key.
    fn pair(directory: &Path) -> [PathBuf; 2] {
        std::fs::create_dir(directory).unwrap();
        drop(Tls::open(PairSource::SelfSigned(directory.to_owned())).unwrap());
        ["server.crt", "server.key"].map(|name| directory.join(name))
    }

    /// Creates a self-signed client certificate (a server certificate is not accepted from clients).
    fn client_pair(directory: &Path) -> [PathBuf; 2] {
        let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
        let key = PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap();
        let mut certificate = X509::builder().unwrap();
        let mut name = X509Name::builder().unwrap();
        name.append_entry_by_nid(Nid::COMMONNAME, "client").unwrap();
        let name = name.build();
        certificate.set_version(2).unwrap();
        certificate.set_subject_name(&name).unwrap();
        certificate.set_issuer_name(&name).unwrap();
        certificate.set_pubkey(&key).unwrap();
        certificate.set_not_before(&Asn1Time::days_from_now(0).unwrap()).unwrap();
        certificate.set_not_after(&Asn1Time::days_from_now(1).unwrap()).unwrap();
        certificate.sign(&key, MessageDigest::sha256()).unwrap();
        std::fs::create_dir(directory).unwrap();
        let files = ["cert", "key"].map(|name| directory.join(name));
        std::fs::write(&files[0], certificate.build().to_pem().unwrap()).unwrap();
        std::fs::write(&files[1], key.private_key_to_pem_pkcs8().unwrap()).unwrap();
        files
    }

    /// Offers this machine's engine by TLS to clients with the certificate `client`; returns the port.
    async fn serve([certificate, key]: &[PathBuf; 2], client: &Path) -> u16 {
        let mut tls = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server()).unwrap();
        tls.set_certificate_chain_file(certificate).unwrap();
        tls.set_private_key_file(key, SslFiletype::PEM).unwrap();
        tls.set_ca_file(client).unwrap();
        tls.set_verify(SslVerifyMode::PEER | SslVerifyMode::FAIL_IF_NO_PEER_CERT);
        let tls = tls.build();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        actix::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let mut near = SslStream::new(Ssl::new(tls.context()).unwrap(), stream).unwrap();
                actix::spawn(async move {
                    Pin::new(&mut near).accept().await.ok()?;
                    let mut engine = UnixStream::connect("/var/run/docker.sock").await.unwrap();
                    copy_bidirectional(&mut near, &mut engine).await.ok()
                });
            }
        });
        port
    }

    #[actix::test]
    #[cfg_attr(not(has_docker), ignore = "needs a Docker Engine and its client")]
    async fn an_engine_that_needs_tls_is_reached_with_certificates() {
        let directory = tempfile::tempdir().unwrap();
        let server = pair(&directory.path().join("server"));
        let client = client_pair(&directory.path().join("client"));
        let port = serve(&server, &client[0]).await;
        let certificates = directory.path().join("certificates");
        std::fs::create_dir(&certificates).unwrap();
        let environment = [
            ("DOCKER_HOST", format!("tcp://localhost:{port}")),
            ("DOCKER_TLS_VERIFY", "1".to_owned()),
            ("DOCKER_CERT_PATH", certificates.display().to_string()),
        ];
        let environment = environment.map(|(name, value)| (name.into(), value.into()));
        let scratch = directory.path().join("scratch");
        let connect = || async {
            let engine = Engine::connect(&environment, &scratch).await;
            engine.map_err(|error| WithCauses(&error).to_string())
        };

        let refused = connect().await.unwrap_err();
        assert!(refused.contains("ca.pem"), "{refused}");
        // First with the wrong authority, then without a client certificate.
        for ca in [&client[0], &server[0]] {
            std::fs::copy(ca, certificates.join("ca.pem")).unwrap();
            let refused = connect().await.unwrap_err();
            assert!(
                refused.contains(&format!("no Docker Engine at tcp://localhost:{port}")),
                "{refused}"
            );
        }
        std::fs::copy(&client[0], certificates.join("cert.pem")).unwrap();
        std::fs::copy(&client[1], certificates.join("key.pem")).unwrap();
        let engine = connect().await.unwrap();
        engine.api.ping().await.unwrap();
        let missing = engine.attach("no-such-container").await.err().unwrap().to_string();
        assert!(missing.contains("No such container"), "{missing}");
    }
}
