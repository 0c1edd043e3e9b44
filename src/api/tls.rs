//! The HTTPS server's certificate and key: from files, or self-signed by the agent.

use actors::errors::{Cause, ErrorOf};
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

/// Validity of a self-signed certificate, in days.
const SELF_SIGNED_VALIDITY: u32 = 365;

/// How long before its end a self-signed certificate is renewed, in days.
const RENEWED_BEFORE: u32 = 30;

/// Where the pair of certificate and key comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PairSource {
    /// Two files of the user.
    Files {
        /// The certificate and its chain, in PEM.
        cert: PathBuf,
        /// The private key, in PEM.
        key: PathBuf,
    },
    /// A self-signed pair in this directory of the agent, which makes and renews it.
    SelfSigned(PathBuf),
}

impl PairSource {
    /// Chooses the files `cert` and `key` if one is given (the other one then has its default name); else
    /// `server.crt` and `server.key` in the working directory if one of them exists; else a self-signed pair
    /// in `own`.
    ///
    /// Fails if the files in the working directory belong to neither this user nor root: another owner knows
    /// the key.
    pub fn choose(
        cert: Option<PathBuf>,
        key: Option<PathBuf>,
        own: PathBuf,
    ) -> Result<Self, TlsError> {
        let defaults = ["server.crt", "server.key"].map(PathBuf::from);
        if cert.is_none() && key.is_none() {
            if !defaults.iter().any(|path| path.exists()) {
                return Ok(Self::SelfSigned(own));
            }
            for path in &defaults {
                if let Ok(found) = fs::metadata(path)
                    && found.uid() != 0
                    && found.uid() != geteuid().as_raw()
                {
                    let why = format!(
                        "this file in the working directory belongs to another user (uid {}), so \
                         it is not used; to use it all the same, name it with --tls-cert-path and --tls-key-path",
                        found.uid()
                    );
                    return Err(error_of(path, why));
                }
            }
        }
        let [default_cert, default_key] = defaults;
        Ok(Self::Files { cert: cert.unwrap_or(default_cert), key: key.unwrap_or(default_key) })
    }

    /// Returns a warning if every user can read the key's file.
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

/// Why no certificate and key could be loaded; names the file or directory concerned.
pub type TlsError = ErrorOf;

fn error_of(path: &Path, cause: impl Into<Cause>) -> TlsError {
    ErrorOf::new(path.display().to_string(), cause)
}

/// The server side of TLS. The pair can be replaced while the server runs.
pub struct Tls {
    source: PairSource,
    current: RwLock<SslAcceptor>,
}

impl Tls {
    /// Reads the pair, and makes a self-signed one first if necessary. Also returns the certificate's SHA-256
    /// fingerprint in hexadecimal with colons.
    pub fn open(source: PairSource) -> Result<(Self, String), TlsError> {
        renew_self_signed(&source)?;
        let (acceptor, fingerprint) = read(&source)?;
        Ok((Self { source, current: RwLock::new(acceptor) }, fingerprint))
    }

    /// Reads the pair again, for new connections, and returns the new fingerprint. On an error the old pair
    /// stays.
    pub fn reload(&self) -> Result<String, TlsError> {
        let (acceptor, fingerprint) = read(&self.source)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = acceptor;
        Ok(fingerprint)
    }

    /// Renews a self-signed pair that expires soon, and returns its fingerprint; `None` if renewal is not
    /// due.
    pub fn renew(&self) -> Option<Result<String, TlsError>> {
        let is_due =
            matches!(&self.source, PairSource::SelfSigned(own) if !is_self_signed_usable(own));
        is_due.then(|| renew_self_signed(&self.source).and_then(|()| self.reload()))
    }

    /// Returns the acceptor for the next connection.
    pub fn acceptor(&self) -> SslAcceptor {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Makes a self-signed pair if `source` asks for one and there is none that stays valid for a while.
fn renew_self_signed(source: &PairSource) -> Result<(), TlsError> {
    let PairSource::SelfSigned(directory) = source else {
        return Ok(());
    };
    let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
    let locked = made.and_then(|()| File::open(directory)).and_then(|own| {
        own.lock()?;
        Ok(own)
    });
    let _lock = locked.map_err(|why| error_of(directory, why))?;
    if is_self_signed_usable(directory) {
        return Ok(());
    }
    write_self_signed(directory).map_err(|why| error_of(directory, why))
}

/// Returns whether `directory` holds a self-signed pair that stays valid for a while and is no certificate
/// authority. Clients may trust the certificate, and jobs of the same user can read its key: as an authority
/// it could sign certificates for other hosts.
fn is_self_signed_usable(directory: &Path) -> bool {
    let [cert, _] = self_signed_files(directory);
    let is_fit = || -> Option<bool> {
        let cert = X509::from_pem(&fs::read(&cert).ok()?).ok()?;
        let soon = Asn1Time::days_from_now(RENEWED_BEFORE).ok()?;
        let is_authority = cert.to_text().ok()?.windows(7).any(|text| text == b"CA:TRUE");
        Some(cert.not_after() > soon && !is_authority)
    };
    is_fit() == Some(true) && read(&PairSource::SelfSigned(directory.to_owned())).is_ok()
}

fn self_signed_files(directory: &Path) -> [PathBuf; 2] {
    ["server.crt", "server.key"].map(|name| directory.join(name))
}

fn read(source: &PairSource) -> Result<(SslAcceptor, String), TlsError> {
    let [cert, key] = match source {
        PairSource::Files { cert, key } => [cert.clone(), key.clone()],
        PairSource::SelfSigned(directory) => self_signed_files(directory),
    };
    let read = |path: &Path| fs::read(path).map_err(|error| error_of(path, error));
    let chain = X509::stack_from_pem(&read(&cert)?);
    let chain = chain.map_err(|_| error_of(&cert, "not a certificate in PEM"))?;
    let Some((leaf, authorities)) = chain.split_first() else {
        return Err(error_of(&cert, "contains no certificate in PEM"));
    };
    let pem = read(&key)?;
    // Without this callback OpenSSL would ask for a passphrase on the terminal.
    let private = PKey::private_key_from_pem_callback(&pem, |_| Ok(0))
        .map_err(|_| error_of(&key, "not a private key in PEM, or one with a passphrase"))?;
    let broken = |error: ErrorStack| error_of(&cert, error);
    if is_expired(leaf).map_err(broken)? {
        let why = format!("the certificate expired on {}", leaf.not_after());
        return Err(error_of(&cert, why));
    }
    if !leaf.public_key().map_err(broken)?.public_eq(&private) {
        let why = format!("is not the key of the certificate in {}", cert.display());
        return Err(error_of(&key, why));
    }
    let acceptor = acceptor(leaf, authorities, &private).map_err(broken)?;
    let fingerprint = leaf.digest(MessageDigest::sha256()).map_err(broken)?;
    let fingerprint: Vec<_> = fingerprint.iter().map(|byte| format!("{byte:02X}")).collect();
    Ok((acceptor, fingerprint.join(":")))
}

fn is_expired(cert: &X509) -> Result<bool, ErrorStack> {
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

/// Replaces the files of the self-signed pair by a new one.
fn write_self_signed(directory: &Path) -> io::Result<()> {
    let [cert, key] = self_signed_files(directory);
    let (made_cert, made_key) = self_signed_pair()?;
    for (path, pem, mode) in [(key, made_key, 0o600), (cert, made_cert, 0o644)] {
        // A new file, as another process may have the old one open.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        File::options().write(true).create_new(true).mode(mode).open(&path)?.write_all(&pem)?;
    }
    Ok(())
}

/// Makes a certificate and its key, in PEM, on the curve P-256, whose handshake is the cheapest.
fn self_signed_pair() -> Result<(Vec<u8>, Vec<u8>), ErrorStack> {
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
    let (now, end) = (Asn1Time::days_from_now(0)?, Asn1Time::days_from_now(SELF_SIGNED_VALIDITY)?);
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
    fn an_unusable_self_signed_pair_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let open = || Tls::open(PairSource::SelfSigned(directory.path().to_owned())).unwrap().1;
        let first = open();
        assert_eq!(open(), first);
        let [cert, key] = self_signed_files(directory.path());
        let other = tempfile::tempdir().unwrap();
        Tls::open(PairSource::SelfSigned(other.path().to_owned())).unwrap();
        let [other_cert, _] = self_signed_files(other.path());
        fs::copy(other_cert, &cert).unwrap();
        let second = open();
        assert_ne!(second, first);
        fs::remove_file(&key).unwrap();
        assert_ne!(open(), second);
        assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o7777, 0o600);
    }
}
