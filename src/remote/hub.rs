//! The control plane of a self-hosted agent, over HTTP (docs/protocol.md: "The self-hosted API").

use std::cell::RefCell;
use std::fmt::Write as _;
use std::rc::Rc;
use std::time::Duration;

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
use crate::remote::http_client::{HttpClients, parse_url, words_of_send_error};

/// How long the control plane may take to answer one request.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The largest job, and the largest of all other answers, in bytes.
const LARGEST_JOB: usize = 64 << 20;
const LARGEST_ANSWER: usize = 1 << 20;

/// How much of a refusal is read, in bytes, for how long, and how much of it is shown, in characters.
const LARGEST_REFUSAL: usize = 64 << 10;
const LAST_WORDS: Duration = Duration::from_secs(5);
const SHOWN: usize = 200;

/// What control planes put in the place of secrets that they have given out (docs/protocol.md: "Fetching a job").
const SANITIZED: &str = "{SANITIZED}";

/// Why a job is not run whose secrets are gone.
const LOST_SECRETS: &str = "the job's secrets were in an answer that got lost, or the job is larger than the control \
                            plane's 4 MiB; it must be rerun";

/// What the agent calls itself.
pub const USER_AGENT: &str = concat!("SemaphoreAgent/", env!("CARGO_PKG_VERSION"));

/// What the agent tells about itself once.
#[derive(Clone, Debug, Serialize)]
pub struct Registration {
    /// Its name, or the URL that stands for one.
    pub name: String,
    /// Of this program.
    pub version: &'static str,
    /// Its process.
    pub pid: u32,
    /// For people.
    pub os: String,
    /// The machine's processor.
    pub arch: &'static str,
    /// The machine's name.
    pub hostname: String,
    /// It is to be shut down after its first job.
    pub single_job: bool,
    /// It is to be shut down after so many seconds without a job; 0 for never.
    pub idle_timeout: u64,
    /// How long its job may go on after an interruption, in seconds.
    pub interruption_grace_period: u64,
    /// The only job that it is for; empty for any.
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

/// A client of the control plane. Clones share its tokens.
#[derive(Clone)]
pub struct Hub {
    shared: Rc<Shared>,
}

struct Shared {
    clients: Rc<HttpClients>,
    base: Uri,
    registration_token: Secret,
    registration: Registration,
    /// What everything but the registration is allowed with.
    access_token: RefCell<String>,
}

impl Hub {
    /// A client of the control plane at `endpoint`, a host and perhaps a port.
    pub fn new(
        clients: Rc<HttpClients>,
        scheme: &str,
        endpoint: &str,
        registration_token: Secret,
        registration: Registration,
    ) -> Result<Self, String> {
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
        let failed = |why: String| HubError::Failed(why);
        let url = format!("{}{path}", self.base);
        let client =
            clients.for_url(&self.base).map_err(|error| failed(format!("no TLS: {error}")))?;
        let token = header::HeaderValue::try_from(format!("Token {token}"))
            .map_err(|_| failed("the token can't stand in a header".into()))?;
        Ok(client
            .request(method, url)
            .insert_header((header::USER_AGENT, USER_AGENT))
            .insert_header((header::CONTENT_TYPE, "application/json"))
            .insert_header((header::AUTHORIZATION, token)))
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        largest: usize,
    ) -> Result<Bytes, HubError> {
        let token = self.access_token.borrow().clone();
        let is_secret = is_url(&self.registration.name);
        answer_to(self.request(&self.clients, method, path, &token)?, body, largest, is_secret)
            .await
    }
}

/// What the control plane answers, its refusals in its own words. `is_secret` tells that these may hold the agent's
/// name, which is a secret.
async fn answer_to(
    request: ClientRequest,
    body: Bytes,
    largest: usize,
    is_secret: bool,
) -> Result<Bytes, HubError> {
    let response = request.send_body(body).await;
    let response = response.map_err(|error| HubError::Failed(words_of_send_error(&error)))?;
    let mut response = response.timeout(PATIENCE);
    let status = response.status();
    if status.is_success() {
        let body = response.body().limit(largest).await;
        return body.map_err(|error| HubError::BrokeOff(error.to_string()));
    }
    let text = match response.timeout(LAST_WORDS).body().limit(LARGEST_REFUSAL).await {
        Ok(text) if !is_secret => {
            String::from_utf8_lossy(&text).trim().chars().take(SHOWN).collect()
        }
        _ => String::new(),
    };
    let why = match text.as_str() {
        "" => format!("the answer is {status}"),
        text => format!("the answer is {status}: {text}"),
    };
    let says = |words: &str| text.to_ascii_lowercase().contains(words);
    Err(match status {
        _ if says("job not available") => HubError::JobGone,
        _ if says("agent can't be registered") => HubError::NameTaken(why),
        StatusCode::UNAUTHORIZED => HubError::Unauthorized(why),
        StatusCode::NOT_FOUND => HubError::NotFound(why),
        StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => HubError::Unusable(why),
        _ => HubError::Failed(why),
    })
}

/// Says what is wrong and where, but no value: it may be a secret.
fn decode<'de, T: Deserialize<'de>>(body: &'de [u8]) -> Result<T, HubError> {
    decode_or(HubError::Failed, body)
}

/// The same. What is no JSON at all may be somebody else's answer, such as a proxy's page, and the next
/// one another; what is JSON, but not what it should be, is `unfit`.
fn decode_or<'de, T: Deserialize<'de>>(
    unfit: fn(String) -> HubError,
    body: &'de [u8],
) -> Result<T, HubError> {
    decode_with(unfit, body, |tracked| T::deserialize(tracked))
}

/// The same, read in this way.
fn decode_with<'de, T>(
    unfit: fn(String) -> HubError,
    body: &'de [u8],
    read: impl FnOnce(TrackedJson<'_, '_, '_, 'de>) -> serde_json::Result<T>,
) -> Result<T, HubError> {
    decode_json(body, read).map_err(|error| {
        let why = format!("the answer is not understood: {error}");
        if error.is_data() { unfit(why) } else { HubError::Failed(why) }
    })
}

/// Why a `200` is not taken for the platform's.
pub const SOMEBODY_ELSES: &str =
    "the answer is a page of somebody else, as a portal in between gives it";

/// Whether a server of the platform can have said this with its `200`: nothing, or JSON.
pub fn is_own_answer(body: &[u8]) -> bool {
    let body = body.trim_ascii();
    body.is_empty() || serde_json::from_slice::<serde::de::IgnoredAny>(body).is_ok()
}

/// Whether the values of this job were overwritten. What its commands say is no value.
fn lacks_its_secrets(body: &[u8]) -> bool {
    fn holds(value: &Value) -> bool {
        match value {
            Value::String(text) => text == SANITIZED,
            Value::Array(list) => list.iter().any(holds),
            Value::Object(map) => map
                .iter()
                .any(|(key, value)| !matches!(key.as_str(), "directive" | "alias") && holds(value)),
            _ => false,
        }
    }
    // Most jobs don't have to be read twice.
    memchr::memmem::find(body, SANITIZED.as_bytes()).is_some()
        && serde_json::from_slice::<Value>(body).is_ok_and(|body| holds(&body))
}

fn encode(value: &impl Serialize) -> Bytes {
    // Fails only for maps whose keys are no strings.
    serde_json::to_vec(value).unwrap_or_default().into()
}

/// As one segment of a path.
fn percent_encoded(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Fails only if writing to a string does.
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
            let answer = answer_to(request, body, LARGEST_ANSWER, is_secret).await;
            let answer = answer.map_err(|error| match error {
                HubError::NotFound(why) => HubError::Failed(format!(
                    "{why} (as with an endpoint that is not the organization's host)"
                )),
                HubError::Unauthorized(why) => {
                    HubError::Failed(format!("{why} (as with a wrong registration token)"))
                }
                error => error,
            })?;
            let answer = answer.trim_ascii();
            let registered: Registered =
                if answer.is_empty() { Registered::default() } else { decode(answer)? };
            let name = registered.name.filter(|name| !name.is_empty());
            // The own one may be a pre-signed URL, which is a secret.
            let name = name.as_deref().filter(|name| !is_url(name)).unwrap_or("as it was given");
            log::info!(name; "the control plane knows this agent");
            shared.access_token.replace(registered.token.unwrap_or_default());
            Ok(())
        }
        .boxed_local()
    }

    fn sync(&self, report: &Report) -> LocalBoxFuture<'static, Result<Answer, HubError>> {
        let shared = Rc::clone(&self.shared);
        let body = encode(report);
        async move { decode(&shared.ask(Method::POST, "/sync", body, LARGEST_ANSWER).await?) }
            .boxed_local()
    }

    fn fetch_job(&self, id: &JobId) -> LocalBoxFuture<'static, Result<Job, HubError>> {
        let shared = Rc::clone(&self.shared);
        let path = format!("/jobs/{}", percent_encoded(id.as_str()));
        async move {
            // A connection of its own: an old one may be dead without this agent's knowledge, and a job is given
            // out once only.
            let clients = shared.clients.afresh();
            let token = shared.access_token.borrow().clone();
            let request = shared.request(&clients, Method::GET, &path, &token)?;
            let is_secret = is_url(&shared.registration.name);
            let body = answer_to(request, Bytes::new(), LARGEST_JOB, is_secret).await;
            let body = body.map_err(|error| match error {
                error @ HubError::BrokeOff(_) => HubError::Unusable(error.to_string()),
                HubError::NotFound(why) => HubError::Failed(why),
                error => error,
            })?;
            let request: OnlyMap<HubRequest> =
                decode_with(HubError::Unusable, &body, |tracked| naming_unknown(tracked))?;
            let mut job =
                request.0.decode().map_err(|error| HubError::Unusable(error.to_string()))?;
            if lacks_its_secrets(&body) {
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
            let body = shared.ask(Method::POST, "/refresh", Bytes::new(), LARGEST_ANSWER).await?;
            decode::<Refreshed>(&body).map(|refreshed| refreshed.token)
        }
        .boxed_local()
    }

    fn disconnect(&self) -> LocalBoxFuture<'static, Result<(), HubError>> {
        let shared = Rc::clone(&self.shared);
        async move {
            let answer =
                shared.ask(Method::POST, "/disconnect", Bytes::new(), LARGEST_ANSWER).await?;
            if is_own_answer(&answer) {
                Ok(())
            } else {
                Err(HubError::Failed(SOMEBODY_ELSES.into()))
            }
        }
        .boxed_local()
    }
}
