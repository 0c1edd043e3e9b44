//! The certificate that `agent serve` makes is only valid for this one server, and files with secrets are
//! checked before they are used.

use std::fs::{self, Permissions};
use std::net::TcpStream;
use std::os::unix::fs::{PermissionsExt as _, lchown};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::gethostname;
use openssl::asn1::Asn1Time;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::PKey;
use openssl::ssl::{SslConnector, SslMethod};
use openssl::x509::extension::{BasicConstraints, ExtendedKeyUsage, SubjectAlternativeName};
use openssl::x509::{X509, X509Name};

use test_support::serve::{SECRET, ServeAgent, refusal};
use test_support::surroundings::{OPERATOR, STRANGER, as_user, can_switch_user};
use test_support::{World, wait_until};

const SECRET_VARIABLE: &str = "SEMAPHORE_AGENT_AUTH_TOKEN_SECRET";

/// Returns the paths of the certificate and key that the agent makes.
fn own(world: &World) -> [PathBuf; 2] {
    ["server.crt", "server.key"].map(|name| world.state().join("tls").join(name))
}

fn read(path: &Path) -> X509 {
    X509::from_pem(&fs::read(path).unwrap()).unwrap()
}

fn host() -> String {
    gethostname().unwrap().into_string().unwrap()
}

/// Returns a certificate and its key in PEM, like those of the agent except for these properties.
fn pair(is_authority: bool, days: u32) -> [Vec<u8>; 2] {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
    let key = PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap();
    let mut name = X509Name::builder().unwrap();
    name.append_entry_by_nid(Nid::COMMONNAME, "semaphore-agent").unwrap();
    let name = name.build();
    let mut cert = X509::builder().unwrap();
    cert.set_version(2).unwrap();
    cert.set_subject_name(&name).unwrap();
    cert.set_issuer_name(&name).unwrap();
    cert.set_pubkey(&key).unwrap();
    cert.set_not_before(&Asn1Time::days_from_now(0).unwrap()).unwrap();
    cert.set_not_after(&Asn1Time::days_from_now(days).unwrap()).unwrap();
    let mut constraints = BasicConstraints::new();
    constraints.critical();
    if is_authority {
        constraints.ca();
    }
    cert.append_extension(constraints.build().unwrap()).unwrap();
    cert.append_extension(ExtendedKeyUsage::new().server_auth().build().unwrap()).unwrap();
    let mut names = SubjectAlternativeName::new();
    names.dns("localhost").ip("127.0.0.1").ip("::1").dns(&host());
    let names = names.build(&cert.x509v3_context(None, None)).unwrap();
    cert.append_extension(names).unwrap();
    cert.sign(&key, MessageDigest::sha256()).unwrap();
    [cert.build().to_pem().unwrap(), key.private_key_to_pem_pkcs8().unwrap()]
}

/// Asserts that the agent's own log contains this warning, or that it does not.
fn assert_warned(agent: &ServeAgent, of: &str, warned: bool, case: &str) {
    let is_there = || {
        let log = agent.own_log();
        log.lines().any(|line| line.contains(" WARN ") && line.contains(of))
    };
    if warned {
        wait_until(is_there, || format!("{case}: no warning of {of}: {}", agent.own_log()));
    } else {
        agent.request("GET", "/is_alive", &[], b"").of_status(200);
        assert!(!is_there(), "{case}: {}", agent.own_log());
    }
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[test]
fn the_agents_certificate_is_for_this_server_and_not_an_authority() {
    let world = World::new();
    let agent = ServeAgent::start(&world);
    let [file, _] = own(&world);
    let cert = read(&file);
    let text = String::from_utf8(cert.to_text().unwrap()).unwrap();
    assert!(text.contains("CA:FALSE") && !text.contains("CA:TRUE"), "{text}");
    let usage = text.split_once("X509v3 Extended Key Usage:").unwrap().1;
    let usage: Vec<_> = usage.lines().filter(|line| !line.trim().is_empty()).collect();
    assert_eq!(usage[0].trim(), "TLS Web Server Authentication", "{text}");
    assert!(!text.contains("Certificate Sign"), "{text}");
    let names = cert.subject_alt_names().unwrap();
    for name in ["localhost", &host()] {
        assert!(names.iter().any(|it| it.dnsname() == Some(name)), "{name}: {text}");
    }
    let one = [&[0; 15][..], &[1]].concat();
    for address in [&[127, 0, 0, 1][..], &one] {
        assert!(names.iter().any(|it| it.ipaddress() == Some(address)), "{address:?}: {text}");
    }
    let life = cert.not_before().diff(cert.not_after()).unwrap();
    assert!((1..=397).contains(&life.days) || (life.days, life.secs) == (398, 0), "{text}");

    for name in ["localhost", "127.0.0.1"] {
        let mut client = SslConnector::builder(SslMethod::tls_client()).unwrap();
        client.set_ca_file(&file).unwrap();
        let tcp = TcpStream::connect(agent.address()).unwrap();
        let connected = client.build().connect(name, tcp);
        assert!(connected.is_ok(), "{name}: {:?}", connected.err());
    }
}

#[test]
#[cfg_attr(not(has_curl), ignore = "needs curl and perl")]
fn curl_trusts_the_agents_certificate_as_its_ca_file() {
    let world = World::new();
    let agent = ServeAgent::start(&world);
    let url = format!("https://localhost:{}/is_alive", agent.address().port());
    let [cert, _] = own(&world);
    let mut curl = Command::new("curl");
    curl.args(["-sS", "-q", "--noproxy", "*", "--cacert"]).arg(cert).arg(url);
    let output = curl.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "yes", "{output:?}");
}

#[test]
fn an_invalid_certificate_of_the_agent_is_replaced() {
    for (is_authority, days, stays) in
        [(false, 300, true), (true, 300, false), (true, 3650, false), (false, 29, false)]
    {
        let world = World::new();
        drop(ServeAgent::start(&world));
        let files = own(&world);
        let old = pair(is_authority, days);
        for (path, pem) in files.iter().zip(&old) {
            fs::write(path, pem).unwrap();
        }
        let agent = ServeAgent::start(&world);
        let shown = agent.connect().ssl().peer_certificate().unwrap();
        let old = X509::from_pem(&old[0]).unwrap();
        let is_old = shown.to_der().unwrap() == old.to_der().unwrap();
        assert_eq!(is_old, stays, "authority: {is_authority}, for {days} days");
        assert_eq!(fs::metadata(&files[1]).unwrap().permissions().mode() & 0o777, 0o600);
    }
}

#[test]
fn a_key_that_others_can_read_is_a_warning_and_a_foreign_key_is_refused() {
    let world = World::new();
    let [cert, key] = pair(false, 300);
    let [cert, key] = [world.file("my.crt", &cert), world.file("my.key", &key)];
    for (mode, warned) in [(0o644, true), (0o600, false), (0o400, false)] {
        set_mode(&key, mode);
        let agent = ServeAgent::start_with(&world, |command| {
            command.arg("--tls-cert-path").arg(&cert).arg("--tls-key-path").arg(&key);
        });
        assert_warned(&agent, key.to_str().unwrap(), warned, &format!("{mode:o}"));
    }
    if !can_switch_user() {
        return;
    }
    let working = world.home().with_file_name("working");
    let found = ["server.crt", "server.key"].map(|name| working.join(name));
    fs::copy(cert, &found[0]).unwrap();
    fs::copy(key, &found[1]).unwrap();
    drop(ServeAgent::start(&world));
    for path in &found {
        lchown(path, Some(STRANGER), Some(STRANGER)).unwrap();
        let message = refusal(&world, |_| {});
        let name = path.file_name().unwrap().to_str().unwrap();
        for word in [name, &STRANGER.to_string()] {
            assert!(message.contains(word), "{word}: {message}");
        }
        lchown(path, Some(0), Some(0)).unwrap();
    }
}

#[test]
fn a_short_secret_is_a_warning() {
    for (length, warned) in [(15, true), (16, false)] {
        let secret = &"0123456789abcdef"[..length];
        let agent = ServeAgent::start_with(&World::new(), |command| {
            command.env(SECRET_VARIABLE, secret);
        });
        assert_warned(&agent, "auth-token-secret", warned, &format!("{length} bytes"));
        assert!(!agent.own_log().contains(secret), "the secret is in the log");
    }
}

/// Sets the path of the file with the secret.
fn with_secret(path: &Path) -> impl FnOnce(&mut Command) {
    move |command| {
        command.env_remove(SECRET_VARIABLE).arg("--auth-token-secret-file").arg(path);
    }
}

#[test]
fn a_secret_that_others_can_read_is_a_warning_and_a_writable_one_is_refused() {
    let world = World::new();
    let file = world.file("secret", format!("{SECRET}\n"));
    let name = file.to_str().unwrap();
    for (mode, warned) in [(0o644, true), (0o600, false), (0o400, false)] {
        set_mode(&file, mode);
        let agent = ServeAgent::start_with(&world, with_secret(&file));
        agent.get("/status").of_status(200);
        assert_warned(&agent, name, warned, &format!("{mode:o}"));
    }
    for mode in [0o602, 0o666] {
        set_mode(&file, mode);
        let message = refusal(&world, with_secret(&file));
        assert!(message.contains(name) && !message.contains(SECRET), "{mode:o}: {message}");
    }
    if !can_switch_user() {
        return;
    }
    set_mode(&file, 0o600);
    lchown(&file, Some(STRANGER), Some(STRANGER)).unwrap();
    let message = refusal(&world, with_secret(&file));
    assert!(
        message.contains(name) && !message.contains(SECRET),
        "a file of another user: {message}"
    );
    // Root owns the file, and the agent runs as another user, which is a common setup.
    let agent = ServeAgent::start_with(&world, |command| {
        with_secret(&file)(command);
        as_user(&world, OPERATOR, command);
        lchown(&file, Some(0), Some(0)).unwrap();
        set_mode(&file, 0o644);
    });
    agent.get("/status").of_status(200);
    assert_warned(&agent, name, true, "of root");
}
