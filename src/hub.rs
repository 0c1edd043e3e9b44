//! The control plane of a self-hosted agent, over HTTP (PROTOCOL: "`agent start`: the self-hosted API").

use std::cell::RefCell;
use std::fmt::Write as _;
use std::rc::Rc;
use std::time::Duration;

use actors::job::{Job, JobId};
use actors::job_request::{OnlyMap, WireRequest};
use actors::ports::{HubApi, HubError};
use actors::sync_protocol::{Answer, Report};
use awc::ClientRequest;
use awc::http::header;
use awc::http::{Method, Uri};
use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use serde::{Deserialize, Serialize};

use crate::config::Secret;
use crate::config::start::is_url;
use crate::http_client::{HttpClients, parse_url};
use crate::serde_words::without_value;

/// How long the control plane may take to answer one request.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The largest job, and the largest of all other answers, in bytes.
const LARGEST_JOB: usize = 64 << 20;
const LARGEST_ANSWER: usize = 1 << 20;

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

    /// Gets a new token for logs.
    pub async fn refresh_token(&self) -> Result<String, HubError> {
        let body = self.shared.ask(Method::POST, "/refresh", Bytes::new(), LARGEST_ANSWER).await?;
        decode::<Refreshed>(&body).map(|refreshed| refreshed.token)
    }
}

impl Shared {
    fn request(&self, method: Method, path: &str, token: &str) -> Result<ClientRequest, HubError> {
        let failed = |why: String| HubError::Failed(why);
        let url = format!("{}{path}", self.base);
        let client =
            self.clients.for_url(&self.base).map_err(|error| failed(format!("no TLS: {error}")))?;
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
        answer_to(self.request(method, path, &token)?, body, largest).await
    }
}

async fn answer_to(request: ClientRequest, body: Bytes, largest: usize) -> Result<Bytes, HubError> {
    let failed = |why: String| HubError::Failed(why);
    let response = request.send_body(body).await.map_err(|error| failed(error.to_string()))?;
    let mut response = response.timeout(PATIENCE);
    let status = response.status();
    if !status.is_success() {
        return Err(failed(format!("the answer is {status}")));
    }
    response.body().limit(largest).await.map_err(|error| failed(error.to_string()))
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
    let mut json = serde_json::Deserializer::from_slice(body);
    serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let (path, what) = (error.path().to_string(), without_value(&error.inner().to_string()));
        let why = format!("the answer is not understood: {path}: {what}");
        if error.inner().is_data() { unfit(why) } else { HubError::Failed(why) }
    })
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
            let request = shared.request(Method::POST, "/register", token)?;
            let body = encode(&shared.registration);
            let answer = answer_to(request, body, LARGEST_ANSWER).await?;
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
            let body = shared.ask(Method::GET, &path, Bytes::new(), LARGEST_JOB).await?;
            let request: OnlyMap<WireRequest> = decode_or(HubError::Unusable, &body)?;
            request.0.decode().map_err(|error| HubError::Unusable(error.to_string()))
        }
        .boxed_local()
    }

    fn disconnect(&self) -> LocalBoxFuture<'static, Result<(), HubError>> {
        let shared = Rc::clone(&self.shared);
        async move {
            shared.ask(Method::POST, "/disconnect", Bytes::new(), LARGEST_ANSWER).await.map(drop)
        }
        .boxed_local()
    }
}
