//! The certificate of `agent serve`: configured, found, generated, and replaced at run time.

use std::fs;
use std::io::{BufReader, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;
use openssl::asn1::Asn1Time;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::ssl::{Ssl, SslContext, SslContextBuilder, SslMethod, SslStream, SslVersion};
use openssl::symm::Cipher;
use openssl::x509::X509;

use test_support::http::{Answer, encode_request};
use test_support::serve::{ServeAgent, refusal};
use test_support::{World, wait_until};

/// A certificate and its key.
struct Pair {
    cert: X509,
    key: PKey<Private>,
}

impl Pair {
    fn for_seconds(seconds: i64) -> Self {
        let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
        let key = PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap();
        let now = i64::try_from(actors::log::event::unix_time()).unwrap();
        let mut cert = X509::builder().unwrap();
        cert.set_pubkey(&key).unwrap();
        cert.set_not_before(&Asn1Time::from_unix(now - 86_400).unwrap()).unwrap();
        cert.set_not_after(&Asn1Time::from_unix(now + seconds).unwrap()).unwrap();
        cert.sign(&key, MessageDigest::sha256()).unwrap();
        Self { cert: cert.build(), key }
    }

    fn good() -> Self {
        Self::for_seconds(3600)
    }

    fn cert_pem(&self) -> Vec<u8> {
        self.cert.to_pem().unwrap()
    }

    fn key_pem(&self) -> Vec<u8> {
        self.key.private_key_to_pem_pkcs8().unwrap()
    }

    fn write(&self, cert: &Path, key: &Path) {
        fs::write(cert, self.cert_pem()).unwrap();
        fs::write(key, self.key_pem()).unwrap();
    }
}

fn fingerprint(cert: &X509) -> String {
    let digest = cert.digest(MessageDigest::sha256()).unwrap();
    digest.iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(":")
}

/// Returns the fingerprint of the certificate on a new connection.
fn shown(agent: &ServeAgent) -> String {
    fingerprint(&agent.connect().ssl().peer_certificate().unwrap())
}

fn given(cert: &Path, key: &Path) -> impl FnOnce(&mut Command) {
    move |command| {
        command.arg("--tls-cert-path").arg(cert).arg("--tls-key-path").arg(key);
    }
}

/// Returns the agent's working directory.
fn working(world: &World) -> PathBuf {
    let directory = world.home().with_file_name("working");
    fs::create_dir_all(&directory).unwrap();
    directory
}

fn connect(
    agent: &ServeAgent,
    adapt: impl Fn(&mut SslContextBuilder),
) -> Result<SslStream<TcpStream>, String> {
    let mut context = SslContext::builder(SslMethod::tls_client()).unwrap();
    adapt(&mut context);
    let tcp = TcpStream::connect(agent.address()).unwrap();
    Ssl::new(&context.build()).unwrap().connect(tcp).map_err(|error| error.to_string())
}

fn ask(connection: &mut BufReader<SslStream<TcpStream>>) -> Answer {
    connection.get_mut().write_all(&encode_request("GET", "/is_alive", &[], b"")).unwrap();
    Answer::read_from(connection, "GET").unwrap()
}

/// Returns the paths of the certificate and key that the agent makes.
fn own(world: &World) -> [PathBuf; 2] {
    ["server.crt", "server.key"].map(|name| world.state().join("tls").join(name))
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn without_a_configured_certificate_the_agent_makes_and_keeps_one() {
    let world = World::new();
    let [cert, key] = own(&world);
    let agent = ServeAgent::start(&world);
    let first = shown(&agent);
    assert!(agent.own_log().contains(&format!("fingerprint={first}")), "{}", agent.own_log());
    assert_eq!((mode(&key), mode(key.parent().unwrap())), (0o600, 0o700));
    let made = [&cert, &key].map(|path| fs::read(path).unwrap());
    assert_eq!(fingerprint(&X509::from_pem(&made[0]).unwrap()), first);
    drop(agent);

    let agent = ServeAgent::start(&world);
    assert_eq!(shown(&agent), first);
    assert!(agent.own_log().contains(&first));
    assert_eq!([&cert, &key].map(|path| fs::read(path).unwrap()), made);
    // Each agent makes its own pair.
    assert_ne!(shown(&ServeAgent::start(&World::new())), first);
}

#[test]
fn an_expired_certificate_of_the_agent_is_replaced() {
    let world = World::new();
    drop(ServeAgent::start(&world));
    let [cert, key] = own(&world);
    let old = Pair::for_seconds(-60);
    old.write(&cert, &key);
    let agent = ServeAgent::start(&world);
    assert_ne!(shown(&agent), fingerprint(&old.cert));
    assert_eq!(mode(&key), 0o600);
}

#[test]
fn a_pair_in_the_working_directory_is_used() {
    let world = World::new();
    let pair = Pair::good();
    pair.write(&working(&world).join("server.crt"), &working(&world).join("server.key"));
    let agent = ServeAgent::start(&world);
    assert_eq!(shown(&agent), fingerprint(&pair.cert));
    assert!(agent.own_log().contains(&fingerprint(&pair.cert)));
    assert!(!world.state().join("tls").exists());
}

#[test]
fn a_configured_pair_is_used() {
    let world = World::new();
    Pair::good().write(&working(&world).join("server.crt"), &working(&world).join("server.key"));
    let (pair, authority) = (Pair::good(), Pair::good());
    let chain = [pair.cert_pem(), authority.cert_pem()].concat();
    let (cert, key) = (world.file("my.crt", chain), world.file("my.key", pair.key_pem()));
    let agent = ServeAgent::start_with(&world, given(&cert, &key));
    assert_eq!(shown(&agent), fingerprint(&pair.cert));
    let connection = agent.connect();
    let sent: Vec<_> = connection
        .ssl()
        .peer_cert_chain()
        .unwrap()
        .iter()
        .map(|c| fingerprint(&c.to_owned()))
        .collect();
    assert_eq!(sent, [fingerprint(&pair.cert), fingerprint(&authority.cert)]);
    drop(agent);
    let agent = ServeAgent::start_with(&world, |command| {
        command
            .env("SEMAPHORE_AGENT_TLS_CERT_PATH", &cert)
            .env("SEMAPHORE_AGENT_TLS_KEY_PATH", &key);
    });
    assert_eq!(shown(&agent), fingerprint(&pair.cert));
}

#[test]
fn an_unusable_pair_is_fatal_and_named() {
    let world = World::new();
    let pair = Pair::good();
    let expired = Pair::for_seconds(-60);
    let locked = pair.key.private_key_to_pem_pkcs8_passphrase(Cipher::aes_128_cbc(), b"x").unwrap();
    let cert = world.file("good.crt", pair.cert_pem());
    let key = world.file("good.key", pair.key_pem());
    let (missing, directory) = (world.home().join("missing"), world.home());
    let garbage = world.file("garbage", "-----BEGIN CERTIFICATE-----\nnonsense\n");
    let old = world.file("old.crt", expired.cert_pem());
    let old_key = world.file("old.key", expired.key_pem());
    let locked = world.file("locked.key", locked);
    let cases = [
        (&missing, &key, &missing, "No such file"),
        (&cert, &missing, &missing, "No such file"),
        (&directory, &key, &directory, "directory"),
        (&cert, &directory, &directory, "directory"),
        (&garbage, &key, &garbage, "certificate"),
        (&key, &key, &key, "certificate"),
        (&cert, &garbage, &garbage, "key"),
        (&cert, &cert, &cert, "key"),
        (&cert, &locked, &locked, "passphrase"),
        (&old, &old_key, &old, "expired"),
        (&cert, &old_key, &old_key, "is not the key"),
    ];
    for (cert, key, blamed, why) in cases {
        let message = refusal(&world, given(cert, key));
        let blamed = format!("{}: ", blamed.display());
        assert!(message.contains(&blamed) && message.contains(why), "{blamed}{why}: {message}");
        assert!(!message.contains("PRIVATE"), "{message}");
    }
    assert!(!world.state().join("tls").exists());
}

#[test]
fn half_a_pair_is_fatal() {
    let pair = Pair::good();
    let cases = [
        ("--tls-cert-path", "server.crt", pair.cert_pem(), "server.key"),
        ("--tls-key-path", "server.key", pair.key_pem(), "server.crt"),
    ];
    for (flag, found, content, missing) in cases {
        let world = World::new();
        let half = world.file("half", &content);
        let given = refusal(&world, |command| {
            command.arg(flag).arg(half);
        });
        fs::write(working(&world).join(found), content).unwrap();
        for message in [given, refusal(&world, |_| {})] {
            assert!(message.contains(&format!("{missing}: No such file")), "{message}");
        }
    }
}

#[test]
fn sighup_replaces_the_pair_for_new_connections() {
    let world = World::new();
    let (cert, key) = (world.home().join("crt"), world.home().join("key"));
    let [first, second, third] = [Pair::good(), Pair::good(), Pair::good()];
    first.write(&cert, &key);
    let agent = ServeAgent::start_with(&world, given(&cert, &key));
    let mut kept = BufReader::new(agent.connect());
    assert_eq!(ask(&mut kept).text(), "yes");

    second.write(&cert, &key);
    agent.signal(Signal::SIGHUP);
    agent.wait_for_own_log(&format!(
        "certificate reloaded fingerprint={}",
        fingerprint(&second.cert)
    ));
    assert_eq!(shown(&agent), fingerprint(&second.cert));
    assert_eq!(ask(&mut kept).text(), "yes");

    // Whatever is wrong with the new pair, the last good one stays in use, and the agent logs the reason.
    fs::write(&key, third.key_pem()).unwrap();
    agent.signal(Signal::SIGHUP);
    agent.wait_for_own_log(&format!(
        "previous one stays in use error=\"{}: is not the key",
        key.display()
    ));
    assert_eq!(shown(&agent), fingerprint(&second.cert));
    fs::remove_file(&cert).unwrap();
    agent.signal(Signal::SIGHUP);
    agent.wait_for_own_log(&format!(
        "previous one stays in use error=\"{}: No such file",
        cert.display()
    ));
    assert_eq!(shown(&agent), fingerprint(&second.cert));

    third.write(&cert, &key);
    agent.signal(Signal::SIGHUP);
    wait_until(|| shown(&agent) == fingerprint(&third.cert), || agent.own_log());
    assert_eq!(ask(&mut kept).text(), "yes");
    assert!(!agent.own_log().contains("PRIVATE"));
}

#[test]
fn old_protocols_are_refused() {
    let agent = ServeAgent::start(&World::new());
    let only = |version| {
        connect(&agent, |context| {
            context.set_cipher_list("ALL:@SECLEVEL=0").unwrap();
            context.set_min_proto_version(Some(version)).unwrap();
            context.set_max_proto_version(Some(version)).unwrap();
        })
    };
    for version in [SslVersion::TLS1, SslVersion::TLS1_1] {
        let error = only(version).err().unwrap();
        assert!(error.contains("alert protocol version"), "{error}");
    }
    for version in [SslVersion::TLS1_2, SslVersion::TLS1_3] {
        let mut connection = BufReader::new(only(version).unwrap());
        assert_eq!(ask(&mut connection).text(), "yes");
    }
}

#[test]
fn a_client_that_offers_http_2_gets_http_1() {
    let agent = ServeAgent::start(&World::new());
    for offered in [b"\x02h2\x08http/1.1".as_slice(), b"\x02h2", b"\x08http/1.1"] {
        let connection = connect(&agent, |context| context.set_alpn_protos(offered).unwrap());
        let connection = connection.unwrap();
        assert_ne!(connection.ssl().selected_alpn_protocol(), Some(b"h2".as_slice()));
        assert_eq!(ask(&mut BufReader::new(connection)).text(), "yes");
    }
}
