//! The certificate and key that the HTTPS server shows: given, found, or made by itself.

use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use nix::unistd::{geteuid, gethostname};
use openssl::asn1::Asn1Time;
use openssl::bn::{BigNum, MsbOption};
use openssl::ec::{EcGroup, EcKey};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::ssl::{SslAcceptor, SslMethod};
use openssl::x509::extension::{
    BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectAlternativeName,
};
use openssl::x509::{X509, X509Name};

/// How long a certificate that the agent makes is good for, and how long before its end it is renewed, in days.
const OWN_VALIDITY: u32 = 365;
const RENEWED_BEFORE: u32 = 30;

/// Where the pair comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PairSource {
    /// From these two files.
    Files {
        /// The certificate, and those that lead to its authority, in PEM.
        cert: PathBuf,
        /// Its private key, in PEM.
        key: PathBuf,
    },
    /// From this directory of the agent, where it is made if it is not there.
    OwnIn(PathBuf),
}

impl PairSource {
    /// What is given; else `server.crt` and `server.key` in the working directory, if one of them
    /// is there; else an own pair in `own`.
    ///
    /// What is found there must be this user's, or root's: somebody else's key is known to them.
    pub fn choose(
        cert: Option<PathBuf>,
        key: Option<PathBuf>,
        own: PathBuf,
    ) -> Result<Self, TlsError> {
        let defaults = ["server.crt", "server.key"].map(PathBuf::from);
        if cert.is_none() && key.is_none() {
            if !defaults.iter().any(|path| path.exists()) {
                return Ok(Self::OwnIn(own));
            }
            for path in &defaults {
                if let Ok(found) = fs::metadata(path)
                    && found.uid() != 0
                    && found.uid() != geteuid().as_raw()
                {
                    let why = format!(
                        "this file in the working directory belongs to another user (number {}), so \
                         it is not used; name it with --tls-cert-path and --tls-key-path if it is meant",
                        found.uid()
                    );
                    return Err(TlsError::of(path, why));
                }
            }
        }
        let [default_cert, default_key] = defaults;
        Ok(Self::Files { cert: cert.unwrap_or(default_cert), key: key.unwrap_or(default_key) })
    }

    /// What is wrong with the key's file, if others can read it.
    pub fn warning(&self) -> Option<String> {
        let Self::Files { key, .. } = self else {
            return None;
        };
        let mode = fs::metadata(key).ok()?.mode();
        let path = key.display();
        (mode & 0o004 != 0).then(|| {
            format!("{path}: every user of this machine can read this private key; `chmod 600` it")
        })
    }
}

/// The pair can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {why}")]
pub struct TlsError {
    /// The file that is to blame.
    path: String,
    /// What is wrong with it.
    why: String,
}

impl TlsError {
    fn of(path: &Path, why: impl fmt::Display) -> Self {
        Self { path: path.display().to_string(), why: why.to_string() }
    }
}

/// Makes TLS of TCP connections, with a pair that can be changed meanwhile.
pub struct Tls {
    source: PairSource,
    current: RwLock<SslAcceptor>,
}

impl Tls {
    /// Reads the pair, or makes it. Answers its SHA-256 fingerprint too, in the usual notation.
    pub fn open(source: PairSource) -> Result<(Self, String), TlsError> {
        renew_own(&source)?;
        let (acceptor, fingerprint) = read(&source)?;
        Ok((Self { source, current: RwLock::new(acceptor) }, fingerprint))
    }

    /// Reads the pair anew, for new connections. On an error the old one stays.
    pub fn reload(&self) -> Result<String, TlsError> {
        let (acceptor, fingerprint) = read(&self.source)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = acceptor;
        Ok(fingerprint)
    }

    /// Makes an own pair anew if its time is nearly over; `None` if it is not.
    pub fn renew(&self) -> Option<Result<String, TlsError>> {
        let is_due = matches!(&self.source, PairSource::OwnIn(own) if !is_usable_own(own));
        is_due.then(|| renew_own(&self.source).and_then(|()| self.reload()))
    }

    /// For the next connection.
    pub fn acceptor(&self) -> SslAcceptor {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Makes the agent's own pair if it is to have one, and there is none that is good for a while.
fn renew_own(source: &PairSource) -> Result<(), TlsError> {
    let PairSource::OwnIn(directory) = source else {
        return Ok(());
    };
    let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
    let locked = made.and_then(|()| File::open(directory)).and_then(|own| {
        own.lock()?;
        Ok(own)
    });
    let _others_wait = locked.map_err(|why| TlsError::of(directory, why))?;
    if is_usable_own(directory) {
        return Ok(());
    }
    make_own_pair(directory).map_err(|why| TlsError::of(directory, why))
}

/// Whether there is an own pair that is good for a while, and whose key, which jobs of the same user can read, signs no
/// certificates for others.
fn is_usable_own(directory: &Path) -> bool {
    let [cert, _] = own_files(directory);
    let lasts = || -> Option<bool> {
        let cert = X509::from_pem(&fs::read(&cert).ok()?).ok()?;
        let soon = Asn1Time::days_from_now(RENEWED_BEFORE).ok()?;
        let is_authority = cert.to_text().ok()?.windows(7).any(|text| text == b"CA:TRUE");
        Some(cert.not_after() > soon && !is_authority)
    };
    lasts() == Some(true) && read(&PairSource::OwnIn(directory.to_owned())).is_ok()
}

fn own_files(directory: &Path) -> [PathBuf; 2] {
    ["server.crt", "server.key"].map(|name| directory.join(name))
}

fn read(source: &PairSource) -> Result<(SslAcceptor, String), TlsError> {
    let [cert, key] = match source {
        PairSource::Files { cert, key } => [cert.clone(), key.clone()],
        PairSource::OwnIn(directory) => own_files(directory),
    };
    let read = |path: &Path| fs::read(path).map_err(|error| TlsError::of(path, error));
    let chain = X509::stack_from_pem(&read(&cert)?);
    let chain = chain.map_err(|_| TlsError::of(&cert, "is not a certificate in PEM"))?;
    let Some((leaf, authorities)) = chain.split_first() else {
        return Err(TlsError::of(&cert, "holds no certificate in PEM"));
    };
    let pem = read(&key)?;
    // A callback, so that nobody is asked for a passphrase on a terminal.
    let private = PKey::private_key_from_pem_callback(&pem, |_| Ok(0))
        .map_err(|_| TlsError::of(&key, "is not a private key in PEM, or one with a passphrase"))?;
    let broken = |error: ErrorStack| TlsError::of(&cert, error);
    if is_past(leaf).map_err(broken)? {
        let why = format!("the certificate expired on {}", leaf.not_after());
        return Err(TlsError::of(&cert, why));
    }
    if !leaf.public_key().map_err(broken)?.public_eq(&private) {
        let why = format!("is not the key of the certificate in {}", cert.display());
        return Err(TlsError::of(&key, why));
    }
    let acceptor = acceptor(leaf, authorities, &private).map_err(broken)?;
    let fingerprint = leaf.digest(MessageDigest::sha256()).map_err(broken)?;
    let fingerprint: Vec<_> = fingerprint.iter().map(|byte| format!("{byte:02X}")).collect();
    Ok((acceptor, fingerprint.join(":")))
}

fn is_past(cert: &X509) -> Result<bool, ErrorStack> {
    Ok(cert.not_after() < Asn1Time::days_from_now(0)?)
}

fn acceptor(
    leaf: &X509,
    authorities: &[X509],
    private: &PKey<Private>,
) -> Result<SslAcceptor, ErrorStack> {
    let mut acceptor = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server())?;
    acceptor.set_certificate(leaf)?;
    for authority in authorities {
        acceptor.add_extra_chain_cert(authority.clone())?;
    }
    acceptor.set_private_key(private)?;
    Ok(acceptor.build())
}

/// Makes the pair in the place of what can't be used.
fn make_own_pair(directory: &Path) -> io::Result<()> {
    let [cert, key] = own_files(directory);
    let (made_cert, made_key) = own_pair()?;
    for (path, pem, mode) in [(key, made_key, 0o600), (cert, made_cert, 0o644)] {
        // Whatever is there, nobody else can have it open then.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        File::options().write(true).create_new(true).mode(mode).open(&path)?.write_all(&pem)?;
    }
    Ok(())
}

/// A P-256 pair, in PEM: its handshake is the cheapest one.
fn own_pair() -> Result<(Vec<u8>, Vec<u8>), ErrorStack> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
    let key = PKey::from_ec_key(EcKey::generate(&group)?)?;
    let mut name = X509Name::builder()?;
    name.append_entry_by_nid(Nid::COMMONNAME, "semaphore-agent")?;
    let name = name.build();
    let mut serial = BigNum::new()?;
    serial.rand(120, MsbOption::ONE, false)?;

    let mut cert = X509::builder()?;
    cert.set_version(2)?;
    let serial = serial.to_asn1_integer()?;
    cert.set_serial_number(&serial)?;
    cert.set_subject_name(&name)?;
    cert.set_issuer_name(&name)?;
    cert.set_pubkey(&key)?;
    let (now, end) = (Asn1Time::days_from_now(0)?, Asn1Time::days_from_now(OWN_VALIDITY)?);
    cert.set_not_before(&now)?;
    cert.set_not_after(&end)?;
    cert.append_extension(BasicConstraints::new().critical().build()?)?;
    cert.append_extension(KeyUsage::new().critical().digital_signature().build()?)?;
    cert.append_extension(ExtendedKeyUsage::new().server_auth().build()?)?;
    let mut names = SubjectAlternativeName::new();
    names.dns("localhost").ip("127.0.0.1").ip("::1");
    if let Some(host) = gethostname().ok().and_then(|host| host.into_string().ok())
        && !host.is_empty()
    {
        names.dns(&host);
    }
    let names = names.build(&cert.x509v3_context(None, None))?;
    cert.append_extension(names)?;
    cert.sign(&key, MessageDigest::sha256())?;
    Ok((cert.build().to_pem()?, key.private_key_to_pem_pkcs8()?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn an_own_pair_that_can_not_be_used_is_made_anew() {
        let directory = tempfile::tempdir().unwrap();
        let open = || Tls::open(PairSource::OwnIn(directory.path().to_owned())).unwrap().1;
        let first = open();
        assert_eq!(open(), first);
        let [cert, key] = own_files(directory.path());
        let other = tempfile::tempdir().unwrap();
        Tls::open(PairSource::OwnIn(other.path().to_owned())).unwrap();
        let [other_cert, _] = own_files(other.path());
        fs::copy(other_cert, &cert).unwrap();
        let second = open();
        assert_ne!(second, first);
        fs::remove_file(&key).unwrap();
        assert_ne!(open(), second);
        assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o7777, 0o600);
    }
}
