//! `agent start` and control planes over HTTPS: trusted authorities, and proxies.

use std::io::{self, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};

use openssl::asn1::Asn1Time;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::ssl::{SslAcceptor, SslMethod};
use openssl::x509::extension::{BasicConstraints, SubjectAlternativeName};
use openssl::x509::{X509, X509Name};
use serde_json::json;

use test_support::http::{Answer, Request, encode_request};
use test_support::start::{Hub, SOON, StartAgent, TOKEN, command, refusal};
use test_support::{World, job};

/// A host name that only the proxy of this test can resolve.
const UNKNOWN_HOST: &str = "hub.invalid";

/// A certificate authority.
struct Authority {
    cert: X509,
    key: PKey<Private>,
}

impl Authority {
    fn new() -> Self {
        let (cert, key) = certificate(None, &[]);
        Self { cert, key }
    }

    fn file(&self, world: &World, name: &str) -> PathBuf {
        world.file(name, self.cert.to_pem().unwrap())
    }
}

/// Makes a certificate for these names and addresses, or that of an authority.
fn certificate(by: Option<&Authority>, names: &[&str]) -> (X509, PKey<Private>) {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
    let key = PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap();
    let mut name = X509Name::builder().unwrap();
    let text = if by.is_some() { "hub" } else { "authority" };
    name.append_entry_by_nid(Nid::COMMONNAME, text).unwrap();
    let name = name.build();
    let mut cert = X509::builder().unwrap();
    cert.set_version(2).unwrap();
    cert.set_pubkey(&key).unwrap();
    cert.set_subject_name(&name).unwrap();
    cert.set_not_before(&Asn1Time::days_from_now(0).unwrap()).unwrap();
    cert.set_not_after(&Asn1Time::days_from_now(1).unwrap()).unwrap();
    let Some(by) = by else {
        cert.set_issuer_name(&name).unwrap();
        cert.append_extension(BasicConstraints::new().critical().ca().build().unwrap()).unwrap();
        cert.sign(&key, MessageDigest::sha256()).unwrap();
        return (cert.build(), key);
    };
    cert.set_issuer_name(by.cert.subject_name()).unwrap();
    let mut known_as = SubjectAlternativeName::new();
    for name in names {
        if name.parse::<Ipv4Addr>().is_ok() {
            known_as.ip(name);
        } else {
            known_as.dns(name);
        }
    }
    let known_as = known_as.build(&cert.x509v3_context(Some(&by.cert), None)).unwrap();
    cert.append_extension(known_as).unwrap();
    cert.sign(&by.key, MessageDigest::sha256()).unwrap();
    (cert.build(), key)
}

/// Listens on a free port and serves each connection on a thread of its own.
fn serve(answer: impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let answer = Arc::new(answer);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let answer = Arc::clone(&answer);
            // An agent may close the connection or refuse the certificate, which the test checks elsewhere.
            std::thread::spawn(move || answer(stream.unwrap()));
        }
    });
    address
}

/// A control plane that is only reachable over HTTPS.
struct SecureHub {
    plain: Hub,
    address: SocketAddr,
}

impl SecureHub {
    fn start(by: &Authority, names: &[&str]) -> Self {
        let plain = Hub::start(SOON);
        let (cert, key) = certificate(Some(by), names);
        let mut tls = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server()).unwrap();
        tls.set_certificate(&cert).unwrap();
        tls.set_private_key(&key).unwrap();
        let tls = tls.build();
        let behind = plain.endpoint();
        let address = serve(move |stream| {
            let mut stream = BufReader::new(tls.accept(stream).map_err(io::Error::other)?);
            let Request { method, path, headers, body } = Request::read_from(&mut stream)?;
            let passed_on = ["authorization", "content-type", "content-encoding"];
            let headers = headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
            let headers = headers.filter(|(name, _)| passed_on.contains(name));
            let headers: Vec<_> = headers.chain([("connection", "close")]).collect();
            let mut plain = TcpStream::connect(&behind)?;
            plain.write_all(&encode_request(&method, &path, &headers, &body))?;
            let answer = Answer::read_from(&mut BufReader::new(plain), &method)?;
            let length = answer.body.len();
            let status = answer.status;
            let head = format!(
                "HTTP/1.1 {status} Answer\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
            );
            let stream = stream.get_mut();
            stream.write_all(&[head.as_bytes(), &answer.body].concat())?;
            stream.shutdown().map(drop).map_err(io::Error::other)
        });
        Self { plain, address }
    }

    /// Returns host and port, with this host name.
    fn endpoint(&self, host: &str) -> String {
        format!("{host}:{}", self.address.port())
    }

    /// Starts an agent that uses this host name.
    fn agent(&self, world: &World, host: &str, adapt: impl FnOnce(&mut Command)) -> StartAgent {
        let mut command = command(world);
        command.args(["--endpoint", &self.endpoint(host)]).env("SEMAPHORE_AGENT_TOKEN", TOKEN);
        adapt(&mut command);
        StartAgent::spawn(world, command)
    }

    /// Asserts that no request came through, and that the agent logs this reason.
    fn assert_refused(&self, mut agent: StartAgent, why: &str) {
        let own_log = agent.wait_for_own_log("the request failed; retrying");
        let line = own_log.lines().find(|line| line.contains("retrying")).unwrap();
        assert!(line.contains("what=registration") && line.contains(why), "{why}: {own_log}");
        agent.interrupt();
        assert_eq!(agent.exit_code_and_log().0, Some(0));
        assert_eq!(self.plain.look(|known| known.requests.len()), 0);
    }

    /// Asserts that a job passes, and that its log is also delivered by HTTPS.
    fn assert_usable(&self, host: &str) {
        let mut request = job("1", &["echo hi"]);
        let url = format!("https://{}/api/v1/logs/1", self.endpoint(host));
        request["logger"] = json!({ "method": "push", "url": url, "token": "log-token-0" });
        self.plain.queue(request);
        let log = self.plain.finish("1");
        assert_eq!((log.result(), log.output().as_str()), ("passed", "hi\n"));
    }
}

#[test]
fn a_private_authority_is_trusted_where_it_is_named() {
    let world = World::new();
    let authority = Authority::new();
    let hub = SecureHub::start(&authority, &["127.0.0.1"]);
    let file = authority.file(&world, "ca.pem");
    let agent = hub.agent(&world, "127.0.0.1", |command| {
        command.arg("--ca-file").arg(&file);
    });
    hub.assert_usable("127.0.0.1");
    drop(agent);
}

#[test]
fn an_authority_of_the_machine_is_trusted_with_and_without_another() {
    let world = World::new();
    let authority = Authority::new();
    let machine = authority.file(&world, "machine.pem");
    let other = Authority::new().file(&world, "other.pem");
    for ca_file in [None, Some(other)] {
        let hub = SecureHub::start(&authority, &["127.0.0.1"]);
        let _agent = hub.agent(&world, "127.0.0.1", |command| {
            command.env("SSL_CERT_FILE", &machine);
            if let Some(ca_file) = ca_file {
                command.arg("--ca-file").arg(ca_file);
            }
        });
        hub.assert_usable("127.0.0.1");
    }
}

#[test]
fn an_untrusted_control_plane_is_refused_and_the_log_says_why() {
    let world = World::new();
    let authority = Authority::new();
    let hub = SecureHub::start(&authority, &["127.0.0.1"]);
    let why = "certificate verify failed";
    hub.assert_refused(hub.agent(&world, "127.0.0.1", |_| {}), why);
    let other = Authority::new().file(&world, "other.pem");
    let agent = hub.agent(&world, "127.0.0.1", |command| {
        command.arg("--ca-file").arg(other);
    });
    hub.assert_refused(agent, why);

    let elsewhere = SecureHub::start(&authority, &["elsewhere.example"]);
    let file = authority.file(&world, "ca.pem");
    let agent = elsewhere.agent(&world, "127.0.0.1", |command| {
        command.arg("--ca-file").arg(&file);
    });
    elsewhere.assert_refused(agent, why);
}

#[test]
fn a_file_without_authorities_is_fatal() {
    let world = World::new();
    let key = Authority::new().key.private_key_to_pem_pkcs8().unwrap();
    let cut = Authority::new().cert.to_pem().unwrap();
    for file in [
        world.home(),
        world.file("empty.pem", ""),
        world.file("text.pem", "not PEM"),
        world.file("key.pem", key),
        world.file("cut.pem", &cut[..cut.len() / 2]),
    ] {
        let mut agent = command(&world);
        agent.args(["--endpoint", "hub"]).env("SEMAPHORE_AGENT_TOKEN", TOKEN);
        let message = refusal(agent.arg("--ca-file").arg(&file));
        let expected =
            format!("--ca-file: `{}` is not a readable file of certificates", file.display());
        assert!(message.contains(&expected), "{message}");
    }
}

/// The requests to a proxy, with the login in their headers.
type ProxyRequest = (String, Option<String>);

/// A proxy that requires a login, and forwards all connections to the same address.
struct ConnectProxy {
    address: SocketAddr,
    received: Arc<Mutex<Vec<ProxyRequest>>>,
}

impl ConnectProxy {
    fn to(target: SocketAddr, login: &'static str) -> Self {
        let received = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&received);
        let address = serve(move |stream| {
            let mut stream = BufReader::new(stream);
            let Request { method, path, headers, .. } = Request::read_from(&mut stream)?;
            let header = |name| headers.iter().find(|(its, _)| its == name);
            let given = header("proxy-authorization").map(|(_, value)| value.clone());
            log.lock().unwrap().push((format!("{method} {path}"), given.clone()));
            let mut stream = stream.into_inner();
            if given.as_deref().unwrap_or_default() != login {
                return stream.write_all(b"HTTP/1.1 407 Log in first\r\n\r\n");
            }
            let mut target = TcpStream::connect(target)?;
            stream.write_all(b"HTTP/1.1 200 Connected\r\nX-Other: 1\r\n\r\n")?;
            let (mut from, mut to) = (stream.try_clone()?, target.try_clone()?);
            std::thread::spawn(move || {
                let _ = io::copy(&mut from, &mut to);
                to.shutdown(std::net::Shutdown::Write)
            });
            io::copy(&mut target, &mut stream)?;
            stream.shutdown(std::net::Shutdown::Write)
        });
        Self { address, received }
    }

    fn received(&self) -> Vec<ProxyRequest> {
        self.received.lock().unwrap().clone()
    }
}

#[test]
fn the_agent_logs_in_to_a_proxy_and_reaches_hosts_that_only_the_proxy_knows() {
    let world = World::new();
    let authority = Authority::new();
    let hub = SecureHub::start(&authority, &[UNKNOWN_HOST]);
    let file = authority.file(&world, "ca.pem");
    // "me:canary@:%", escaped for a URL.
    let login = "Basic bWU6Y2FuYXJ5QDol";
    let proxy = ConnectProxy::to(hub.address, login);
    let mut agent = hub.agent(&world, UNKNOWN_HOST, |command| {
        command.arg("--ca-file").arg(&file).env("NO_PROXY", "other.invalid,127.0.0.1");
        command.env("HTTPS_PROXY", format!("http://me:canary%40%3A%25@{}", proxy.address));
    });
    hub.assert_usable(UNKNOWN_HOST);
    agent.interrupt();
    assert_eq!(agent.exit_code_and_log().0, Some(0));
    let received = proxy.received();
    assert!(received.len() >= 4, "{received:?}");
    let expected = (format!("CONNECT {}", hub.endpoint(UNKNOWN_HOST)), Some(login.to_owned()));
    assert!(received.iter().all(|received| *received == expected), "{received:?}");
}

#[test]
fn a_proxy_that_refuses_is_named_without_the_login() {
    let world = World::new();
    let authority = Authority::new();
    let hub = SecureHub::start(&authority, &[UNKNOWN_HOST]);
    let file = authority.file(&world, "ca.pem");
    let proxy = ConnectProxy::to(hub.address, "Basic another");
    let agent = hub.agent(&world, UNKNOWN_HOST, |command| {
        command.arg("--ca-file").arg(file);
        command.env("https_proxy", format!("me:canary@{}", proxy.address));
    });
    let why = format!("the proxy {} answered HTTP/1.1 407 Log in first", proxy.address);
    hub.assert_refused(agent, &why);
}

#[test]
fn hosts_that_need_no_proxy_and_plain_http_are_reached_directly() {
    let world = World::new();
    let authority = Authority::new();
    let file = authority.file(&world, "ca.pem");
    for spared in ["127.0.0.1", "127.0.0.0/8", "*"] {
        let hub = SecureHub::start(&authority, &["127.0.0.1"]);
        let proxy = ConnectProxy::to(hub.address, "");
        let _agent = hub.agent(&world, "127.0.0.1", |command| {
            command.arg("--ca-file").arg(&file).env("NO_PROXY", format!("other.invalid, {spared}"));
            command.env("HTTPS_PROXY", format!("http://{}", proxy.address));
        });
        hub.assert_usable("127.0.0.1");
        assert_eq!(proxy.received(), [], "{spared}");
    }
    let control_plane = Hub::start(SOON);
    let proxy = ConnectProxy::to(([127, 0, 0, 1], 1).into(), "");
    let _agent = StartAgent::start_with(&world, &control_plane, |command| {
        command.env("HTTPS_PROXY", format!("http://{}", proxy.address));
    });
    control_plane.queue(job("1", &["true"]));
    assert_eq!(control_plane.finish("1").result(), "passed");
    assert_eq!(proxy.received(), []);
}
