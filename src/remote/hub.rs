//! An HTTP client of the control plane, for self-hosted agents (docs/protocol.md: "The self-hosted API").

use std::cell::RefCell;
use std::fmt::Write as _;
use std::rc::Rc;
use std::time::Duration;

use actors::errors::{Cause, ErrorOf, WithCauses};
use actors::intake::protocol::{Answer, Report};
use actors::job::{Job, JobId, Problem};
use actors::ports::{HubApi, HubError};
use actors::request::{HubRequest, OnlyMap};
use awc::ClientRequest;
use awc::http::header;
use awc::http::{Method, StatusCode, Uri};
use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::Secret;
use crate::config::start::is_url;
use crate::decode::{TrackedJson, decode_json, naming_unknown};
use crate::remote::http_client::{HttpClients, HttpError, authorization, parse_url};

/// Time limit of one request to the control plane or a log server; the response body gets as much again.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Limit for a job request, in bytes: it is read into memory.
const LARGEST_JOB: usize = 64 << 20;

/// Limit for all other responses, in bytes.
const LARGEST_RESPONSE: usize = 1 << 20;

/// Limit for the body of an error response, in bytes.
const LARGEST_REFUSAL: usize = 64 << 10;

/// Time limit for reading the body of an error response. The status decides most of the error, so a slow body
/// must not hold it up.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(5);

/// How much of an error response is put into the error, in characters.
const LONGEST_SHOWN_REFUSAL: usize = 200;

/// Control planes overwrite secrets with this text after the first download (docs/protocol.md: "Fetching a
/// job").
const SANITIZED: &str = "{SANITIZED}";

/// The problem of a job whose secrets are overwritten.
const LOST_SECRETS: &str = "the job's secrets were lost with an earlier response, or the job exceeds the control \
                            plane's limit of 4 MiB; it must be rerun";

/// The `User-Agent` header of requests to the control plane and to log servers.
pub const USER_AGENT: &str = concat!("SemaphoreAgent/", env!("CARGO_PKG_VERSION"));

/// The body of the registration request.
#[derive(Clone, Debug, Serialize)]
pub struct Registration {
    /// The agent's name, or a pre-signed URL in place of one.
    pub name: String,
    /// The agent's version.
    pub version: &'static str,
    /// The agent's process id.
    pub pid: u32,
    /// The operating system's name, only shown to people.
    pub os: String,
    /// The processor's architecture.
    pub arch: &'static str,
    /// The machine's host name.
    pub hostname: String,
    /// Whether the control plane is to shut the agent down after its first job.
    pub single_job: bool,
    /// After how many seconds without a job the control plane is to shut the agent down; 0 for never.
    pub idle_timeout: u64,
    /// How long a running job may go on after the agent was asked to end, in seconds.
    pub interruption_grace_period: u64,
    /// The id of the only job that the agent takes; empty if it takes any.
    pub job_id: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Registered {
    name: Option<String>,
    token: Option<String>,
}

#[derive(Deserialize)]
struct Refreshed {
    token: String,
}

/// A client of the control plane. Clones share the access token.
#[derive(Clone)]
pub struct Hub {
    shared: Rc<Shared>,
}

struct Shared {
    clients: Rc<HttpClients>,
    base: Uri,
    registration_token: Secret,
    registration: Registration,
    /// Authorizes all requests but the registration, whose response it comes from.
    access_token: RefCell<String>,
}

impl Hub {
    /// Returns a client of the control plane at `endpoint` (`HOST` or `HOST:PORT`).
    pub fn new(
        clients: Rc<HttpClients>,
        scheme: &str,
        endpoint: &str,
        registration_token: Secret,
        registration: Registration,
    ) -> Result<Self, HttpError> {
        let base = parse_url(&format!("{scheme}://{endpoint}/api/v1/self_hosted_agents"))?;
        let access_token = RefCell::default();
        let shared = Shared { clients, base, registration_token, registration, access_token };
        Ok(Self { shared: Rc::new(shared) })
    }
}

impl Shared {
    fn request(
        &self,
        clients: &HttpClients,
        method: Method,
        path: &str,
        token: &str,
    ) -> Result<ClientRequest, HubError> {
        let authorization = authorization("Token", token).map_err(transient)?;
        let client = clients.for_url(&self.base).map_err(transient)?;
        Ok(client
            .request(method, format!("{}{path}", self.base))
            .insert_header((header::USER_AGENT, USER_AGENT))
            .insert_header((header::CONTENT_TYPE, "application/json"))
            .insert_header((header::AUTHORIZATION, authorization)))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        largest: usize,
    ) -> Result<Bytes, HubError> {
        let token = self.access_token.borrow().clone();
        let is_secret = is_url(&self.registration.name);
        response_to(self.request(&self.clients, method, path, &token)?, body, largest, is_secret)
            .await
    }
}

/// Sends `request` and returns the body of a successful response. Errors quote the beginning of an error
/// response, unless `is_secret`: it may contain the agent's name, which is then a pre-signed URL.
async fn response_to(
    request: ClientRequest,
    body: Bytes,
    largest: usize,
    is_secret: bool,
) -> Result<Bytes, HubError> {
    let response = request.send_body(body).await;
    let response = response.map_err(|error| transient(HttpError::from(error)))?;
    let mut response = response.timeout(PATIENCE);
    let status = response.status();
    if status.is_success() {
        let body = response.body().limit(largest).await;
        return body.map_err(|error| HubError::BrokeOff(error.to_string().into()));
    }
    let text = match response.timeout(REFUSAL_PATIENCE).body().limit(LARGEST_REFUSAL).await {
        Ok(text) if !is_secret => {
            String::from_utf8_lossy(&text).trim().chars().take(LONGEST_SHOWN_REFUSAL).collect()
        }
        _ => String::new(),
    };
    let lower = text.to_ascii_lowercase();
    let error = Box::new(HttpError::Status { status, text });
    // The control plane tells these two by their texts only.
    Err(match status {
        _ if lower.contains("job not available") => HubError::JobGone,
        _ if lower.contains("agent can't be registered") => HubError::NameTaken(error),
        StatusCode::UNAUTHORIZED => HubError::Unauthorized(error),
        StatusCode::NOT_FOUND => HubError::NotFound(error),
        StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => HubError::Permanent(error),
        _ => HubError::Transient(error),
    })
}

fn transient(cause: impl Into<Cause>) -> HubError {
    HubError::Transient(cause.into())
}

/// An error, with a hint at its probable reason.
#[derive(Debug, thiserror::Error)]
#[error("{} ({hint})", WithCauses(&**error))]
struct WithHint {
    error: Cause,
    hint: &'static str,
}

/// Decodes a response. Errors name the place and the problem, but no value, which may be a secret.
fn decode<'de, T: Deserialize<'de>>(body: &'de [u8]) -> Result<T, HubError> {
    decode_or(HubError::Transient, body)
}

/// Like [`decode`], but JSON of an unexpected shape is the error `unfit`. A body that is not JSON stays a
/// transient error: it may come from somebody else, such as a proxy.
fn decode_or<'de, T: Deserialize<'de>>(
    unfit: fn(Cause) -> HubError,
    body: &'de [u8],
) -> Result<T, HubError> {
    decode_with(unfit, body, |tracked| T::deserialize(tracked))
}

/// Like [`decode_or`], with a deserializer of the caller's choice.
fn decode_with<'de, T>(
    unfit: fn(Cause) -> HubError,
    body: &'de [u8],
    read: impl FnOnce(TrackedJson<'_, '_, '_, 'de>) -> serde_json::Result<T>,
) -> Result<T, HubError> {
    decode_json(body, read).map_err(|error| {
        let of_kind = if error.is_data() { unfit } else { HubError::Transient };
        of_kind(ErrorOf::new("invalid response", error).into())
    })
}

/// Returns whether the body of a `200` may come from the control plane or a log server: it is empty or JSON.
pub fn may_be_from_control_plane(body: &[u8]) -> bool {
    let body = body.trim_ascii();
    body.is_empty() || serde_json::from_slice::<serde::de::IgnoredAny>(body).is_ok()
}

/// Returns whether the control plane has overwritten this job's secrets. Command texts don't count: they may
/// contain the placeholder themselves.
fn lacks_secrets(body: &[u8]) -> bool {
    fn is_overwritten(value: &Value) -> bool {
        match value {
            Value::String(text) => text == SANITIZED,
            Value::Array(list) => list.iter().any(is_overwritten),
            Value::Object(map) => map.iter().any(|(key, value)| {
                !matches!(key.as_str(), "directive" | "alias") && is_overwritten(value)
            }),
            _ => false,
        }
    }
    // The search saves most jobs from being parsed a second time.
    memchr::memmem::find(body, SANITIZED.as_bytes()).is_some()
        && serde_json::from_slice::<Value>(body).is_ok_and(|body| is_overwritten(&body))
}

fn encode(value: &impl Serialize) -> Bytes {
    // Only maps with keys other than strings fail, and no message has such a map.
    serde_json::to_vec(value).unwrap_or_default().into()
}

/// Encodes `text` as one segment of a URL's path.
fn percent_encoded(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing to a string never fails.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

impl HubApi for Hub {
    fn register(&self) -> LocalBoxFuture<'static, Result<(), HubError>> {
        let shared = Rc::clone(&self.shared);
        async move {
            let token = shared.registration_token.reveal();
            let request = shared.request(&shared.clients, Method::POST, "/register", token)?;
            let body = encode(&shared.registration);
            let is_secret = is_url(&shared.registration.name);
            let response = response_to(request, body, LARGEST_RESPONSE, is_secret).await;
            let response = response.map_err(|error| match error {
                HubError::NotFound(error) => {
                    transient(WithHint { error, hint: "is the endpoint the organization's host?" })
                }
                HubError::Unauthorized(error) => {
                    transient(WithHint { error, hint: "is the registration token right?" })
                }
                error => error,
            })?;
            let response = response.trim_ascii();
            let registered: Registered =
                if response.is_empty() { Registered::default() } else { decode(response)? };
            let name = registered.name.filter(|name| !name.is_empty());
            // A name that is a URL may be pre-signed, which makes it a secret.
            let name = name.as_deref().filter(|name| !is_url(name)).unwrap_or("as configured");
            log::info!(name; "registered with the control plane");
            shared.access_token.replace(registered.token.unwrap_or_default());
            Ok(())
        }
        .boxed_local()
    }

    fn sync(&self, report: &Report) -> LocalBoxFuture<'static, Result<Answer, HubError>> {
        let shared = Rc::clone(&self.shared);
        let body = encode(report);
        async move { decode(&shared.send(Method::POST, "/sync", body, LARGEST_RESPONSE).await?) }
            .boxed_local()
    }

    fn fetch_job(&self, id: &JobId) -> LocalBoxFuture<'static, Result<Job, HubError>> {
        let shared = Rc::clone(&self.shared);
        let path = format!("/jobs/{}", percent_encoded(id.as_str()));
        async move {
            // On a new connection: an idle one may be dead unnoticed, and the control plane hands out a job's
            // secrets only once.
            let clients = shared.clients.with_new_connections();
            let token = shared.access_token.borrow().clone();
            let request = shared.request(&clients, Method::GET, &path, &token)?;
            let is_secret = is_url(&shared.registration.name);
            let body = response_to(request, Bytes::new(), LARGEST_JOB, is_secret).await;
            let body = body.map_err(|error| match error {
                error @ HubError::BrokeOff(_) => HubError::Permanent(error.into()),
                HubError::NotFound(error) => HubError::Transient(error),
                error => error,
            })?;
            let request: OnlyMap<HubRequest> =
                decode_with(HubError::Permanent, &body, |tracked| naming_unknown(tracked))?;
            let mut job = request.0.decode().map_err(|error| HubError::Permanent(error.into()))?;
            if lacks_secrets(&body) {
                log::error!(job:% = job.id, why = LOST_SECRETS; "the job can't be run");
                let problem = Problem { path: String::new(), message: LOST_SECRETS.into() };
                (job.executor, job.ssh_keys) = (Err(vec![problem]), Ok(Vec::new()));
            }
            Ok(job)
        }
        .boxed_local()
    }

    fn refresh_log_token(&self) -> LocalBoxFuture<'static, Result<String, HubError>> {
        let shared = Rc::clone(&self.shared);
        async move {
            let body =
                shared.send(Method::POST, "/refresh", Bytes::new(), LARGEST_RESPONSE).await?;
            decode::<Refreshed>(&body).map(|refreshed| refreshed.token)
        }
        .boxed_local()
    }

    fn disconnect(&self) -> LocalBoxFuture<'static, Result<(), HubError>> {
        let shared = Rc::clone(&self.shared);
        async move {
            let response =
                shared.send(Method::POST, "/disconnect", Bytes::new(), LARGEST_RESPONSE).await?;
            if may_be_from_control_plane(&response) {
                Ok(())
            } else {
                Err(transient(HttpError::Foreign))
            }
        }
        .boxed_local()
    }
}
