//! Authorizes API requests by JSON Web Tokens that are signed with the agent's secret.

use std::sync::Once;

use jsonwebtoken::crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::{Error, ErrorKind};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Validation};
use openssl::hash::MessageDigest;
use openssl::pkey::PKey;
use openssl::sign::Signer;
use serde::Deserialize;

/// Accepted algorithms. HMAC only: a token's header must not choose another kind of check.
const ALGORITHMS: [Algorithm; 3] = [Algorithm::HS256, Algorithm::HS384, Algorithm::HS512];

/// Tolerated difference between the clocks of a client and of this machine, in seconds.
const LEEWAY: u64 = 5;

/// Checks the tokens of API requests.
pub struct Auth {
    key: DecodingKey,
    validation: Validation,
}

/// No claim is required (docs/protocol.md: "The hosted API").
#[derive(Clone, Deserialize)]
struct Claims {}

impl Auth {
    /// Checks tokens against `secret`. Returns `None` if it is empty: anybody could sign with an empty
    /// secret.
    pub fn new(secret: &[u8]) -> Option<Self> {
        static INSTALLED: Once = Once::new();
        if secret.is_empty() {
            return None;
        }
        // Fails only if a provider is installed already, and this program has no other.
        INSTALLED.call_once(|| {
            let _ = PROVIDER.install_default();
        });
        let mut validation = Validation::new(ALGORITHMS[0]);
        validation.algorithms = ALGORITHMS.to_vec();
        validation.required_spec_claims.clear();
        validation.validate_nbf = true;
        validation.validate_aud = false;
        validation.leeway = LEEWAY;
        Some(Self { key: DecodingKey::from_secret(secret), validation })
    }

    /// Checks the value of an `Authorization` header. The error is the message for the client.
    pub fn check(&self, authorization: Option<&[u8]>) -> Result<(), &'static str> {
        const MISSING: &str = "a header `Authorization: Bearer TOKEN` is needed";
        let (scheme, token) = authorization
            .and_then(|value| std::str::from_utf8(value).ok())
            .and_then(|value| value.split_once(' '))
            .ok_or(MISSING)?;
        if !scheme.eq_ignore_ascii_case("Bearer") {
            return Err(MISSING);
        }
        match jsonwebtoken::decode::<Claims>(token.trim(), &self.key, &self.validation) {
            Ok(_) => Ok(()),
            Err(error) => Err(match error.kind() {
                // Clients match these texts.
                ErrorKind::InvalidSignature => "signature is invalid",
                ErrorKind::ExpiredSignature => "token is expired",
                ErrorKind::ImmatureSignature => "token is not valid yet",
                ErrorKind::InvalidAlgorithm => "signing method must be HS256, HS384 or HS512",
                _ => "token is malformed",
            }),
        }
    }
}

/// Verifies HMACs with OpenSSL, which the agent links anyway.
static PROVIDER: CryptoProvider = CryptoProvider {
    signer_factory: refuse_to_sign,
    verifier_factory: verifier,
    key_utils: KeyUtils::new_unimplemented(),
};

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature is the provider's")]
fn refuse_to_sign(_: &Algorithm, _: &EncodingKey) -> Result<Box<dyn JwtSigner>, Error> {
    Err(ErrorKind::UnsupportedAlgorithm.into())
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature is the provider's")]
fn verifier(algorithm: &Algorithm, key: &DecodingKey) -> Result<Box<dyn JwtVerifier>, Error> {
    let digest = match algorithm {
        Algorithm::HS256 => MessageDigest::sha256(),
        Algorithm::HS384 => MessageDigest::sha384(),
        Algorithm::HS512 => MessageDigest::sha512(),
        _ => return Err(ErrorKind::UnsupportedAlgorithm.into()),
    };
    let key = key.try_get_as_bytes()?.to_vec();
    Ok(Box::new(Hmac { algorithm: *algorithm, digest, key }))
}

struct Hmac {
    algorithm: Algorithm,
    digest: MessageDigest,
    key: Vec<u8>,
}

impl signature::Verifier<Vec<u8>> for Hmac {
    fn verify(&self, message: &[u8], given: &Vec<u8>) -> Result<(), signature::Error> {
        let computed = PKey::hmac(&self.key)
            .and_then(|key| Signer::new(self.digest, &key)?.sign_oneshot_to_vec(message))
            .map_err(signature::Error::from_source)?;
        // The comparison takes constant time. A differing length may end it early: lengths are no secret.
        let same = computed.len() == given.len() && openssl::memcmp::eq(&computed, given);
        if same { Ok(()) } else { Err(signature::Error::new()) }
    }
}

impl JwtVerifier for Hmac {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;

    use super::*;

    fn token(header: &str, payload: &str, digest: MessageDigest, secret: &[u8]) -> Vec<u8> {
        let [header, payload] = [header, payload].map(|part| URL_SAFE_NO_PAD.encode(part));
        let message = format!("{header}.{payload}");
        let key = PKey::hmac(secret).unwrap();
        let signature =
            Signer::new(digest, &key).unwrap().sign_oneshot_to_vec(message.as_bytes()).unwrap();
        format!("Bearer {message}.{}", URL_SAFE_NO_PAD.encode(signature)).into_bytes()
    }

    #[test]
    fn only_correctly_signed_and_current_tokens_pass() {
        let auth = Auth::new(b"secret").unwrap();
        let now = actors::log::event::unix_time();
        let hs256 = |payload: &str, secret: &[u8]| {
            token(r#"{"alg":"HS256","typ":"JWT"}"#, payload, MessageDigest::sha256(), secret)
        };
        let later = format!(r#"{{"exp":{},"aud":"x","iss":7}}"#, now + 60);
        for good in ["{}", &later] {
            assert_eq!(auth.check(Some(&hs256(good, b"secret"))), Ok(()), "{good}");
        }
        let hs512 = token(r#"{"alg":"HS512"}"#, "{}", MessageDigest::sha512(), b"secret");
        assert_eq!(auth.check(Some(&hs512)), Ok(()));

        let expired = format!(r#"{{"exp":{}}}"#, now - 60);
        let early = format!(r#"{{"nbf":{}}}"#, now + 60);
        assert_eq!(auth.check(Some(&hs256("{}", b"other"))), Err("signature is invalid"));
        assert_eq!(auth.check(Some(&hs256(&expired, b"secret"))), Err("token is expired"));
        assert_eq!(auth.check(Some(&hs256(&early, b"secret"))), Err("token is not valid yet"));
        for header in [r#"{"alg":"none"}"#, r#"{"alg":"RS256"}"#, r#"{"alg":"EdDSA"}"#, "{}"] {
            let unsigned = token(header, "{}", MessageDigest::sha256(), b"secret");
            assert!(auth.check(Some(&unsigned)).is_err(), "{header}");
        }
        for header in
            [None, Some(&b"Basic eDp5"[..]), Some(b"Bearer"), Some(b"Bearer x"), Some(b"\xff")]
        {
            assert!(auth.check(header).is_err());
        }
    }

    #[test]
    fn an_empty_secret_is_refused() {
        assert!(Auth::new(b"").is_none());
    }
}
