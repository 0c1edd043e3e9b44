//! The routes of the hosted API and their handlers.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use actix_http::ConnectionType;
use actix_server::GracefulShutdownSignal;
use actix_service::ServiceFactory;
use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::{Method, StatusCode, header};
use actix_web::middleware::{Next, from_fn};
use actix_web::web::{self, Bytes, BytesMut, Data, Payload};
use actix_web::{App, Error, HttpRequest, HttpResponse, Route};
use actors::errors::{Cause, WithCauses};
use actors::intake::http::{
    GetStatus, ReadJobLog, ReadRefused, RequestStop, Status, Submission, SubmitJob, SubmitRefused,
};
use actors::job::{Job, JobId};
use actors::request::{OnlyMap, WireRequest};
use futures_util::StreamExt as _;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::api::Api;
use crate::api::connection::Handover;
use crate::api::transfer::{FileBody, TrackedBody, TransferReport};
use crate::decode::{decode_json, naming_unknown};
use crate::service::own_log::open_to_read;
use crate::state::log_file::OpenFile;

struct Endpoint {
    /// In lower case.
    method: &'static str,
    path: &'static str,
    with_handler: fn(Route) -> Route,
}

const ENDPOINTS: [Endpoint; 7] = [
    Endpoint { method: "get", path: "/is_alive", with_handler: |route| route.to(is_alive) },
    Endpoint { method: "get", path: "/status", with_handler: |route| route.to(status) },
    Endpoint { method: "post", path: "/jobs", with_handler: |route| route.to(submit) },
    Endpoint { method: "get", path: "/jobs/{id}/log", with_handler: |route| route.to(log) },
    Endpoint { method: "post", path: "/stop", with_handler: |route| route.to(stop) },
    Endpoint { method: "post", path: "/jobs/terminate", with_handler: |route| route.to(stop) },
    Endpoint { method: "get", path: "/agent_logs", with_handler: |route| route.to(agent_logs) },
];

impl Endpoint {
    fn method(&self) -> Method {
        if self.method == "get" { Method::GET } else { Method::POST }
    }
}

/// All routes, as pairs of method (in lower case) and path.
pub const ROUTES: [(&str, &str); ENDPOINTS.len()] = {
    let mut routes = [("", ""); ENDPOINTS.len()];
    let mut index = 0;
    while index < routes.len() {
        routes[index] = (ENDPOINTS[index].method, ENDPOINTS[index].path);
        index += 1;
    }
    routes
};

/// Time limit for the next part of a request's body.
const BODY_PART_PATIENCE: Duration = Duration::from_secs(20);

/// Time limit for the whole body of a request.
const BODY_PATIENCE: Duration = Duration::from_mins(10);

/// Smaller response bodies are sent without compression, in bytes.
const MIN_COMPRESSED_SIZE: u64 = 1024;

/// Returns the application of one worker.
pub(super) fn app(
    api: Data<Api>,
    ending: GracefulShutdownSignal,
) -> App<
    impl ServiceFactory<
        ServiceRequest,
        Config = (),
        Response = ServiceResponse<BoxBody>,
        Error = Error,
        InitError = (),
    >,
> {
    let mut app = App::new().app_data(api).app_data(ending).wrap(from_fn(authorize_and_log));
    for endpoint in ENDPOINTS {
        let with_slash = format!("{}/", endpoint.path);
        let route = (endpoint.with_handler)(web::method(endpoint.method()));
        let resource = web::resource([endpoint.path, with_slash.as_str()]).route(route);
        app = app.service(resource.default_service(web::to(method_not_allowed)));
    }
    app.default_service(web::to(not_found))
}

/// Limit for a request's method and path in the agent's own log, in bytes. Longer ones could push everything
/// else out of the log.
const LONGEST_LOGGED: usize = 200;

/// Statuses of responses to POST requests whose body was read to its end.
const STATUSES_AFTER_BODY: [StatusCode; 4] = [
    StatusCode::OK,
    StatusCode::UNPROCESSABLE_ENTITY,
    StatusCode::INTERNAL_SERVER_ERROR,
    StatusCode::SERVICE_UNAVAILABLE,
];

/// Returns whether the request's headers announce a body.
fn has_body(request: &ServiceRequest) -> bool {
    let headers = request.headers();
    let length = headers.get(header::CONTENT_LENGTH);
    headers.contains_key(header::TRANSFER_ENCODING) || length.is_some_and(|length| length != "0")
}

/// Middleware that checks the token, logs the request, and closes the connection if a body is left unread.
async fn authorize_and_log(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let began = Instant::now();
    let truncated = |text: &str| text[..text.floor_char_boundary(LONGEST_LOGGED)].to_owned();
    let (method, path) = (truncated(request.method().as_str()), truncated(request.path()));
    let peer = request.peer_addr().map_or_else(String::new, |peer| peer.to_string());
    let handover = request.request().conn_data::<Rc<Handover>>().map(Rc::clone);
    if let Some(handover) = &handover {
        handover.request_started();
    }
    let (has_body, is_post) = (has_body(&request), request.method() == Method::POST);
    let response = match unauthorized(&request) {
        Some(refusal) => Ok(request.into_response(refusal)),
        None => next.call(request).await.map(ServiceResponse::map_into_boxed_body),
    };
    let mut response = response?;
    let is_read = is_post && STATUSES_AFTER_BODY.contains(&response.status());
    if has_body && !is_read {
        // A connection that is kept alive would wait for the rest of the body, however long it takes.
        response.response_mut().head_mut().set_connection_type(ConnectionType::Close);
        if let Some(handover) = &handover {
            handover.close_after_response();
        }
    }
    let response = response.map_body(|_, body| match handover {
        Some(handover) => TrackedBody { body, handover }.boxed(),
        None => body,
    });
    let status = response.status().as_u16();
    let us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    // Platforms poll this path.
    let level = if path.starts_with("/is_alive") { log::Level::Debug } else { log::Level::Info };
    let is_refused = response.status() == StatusCode::UNAUTHORIZED;
    if !is_refused || count_refusal(response.request()) {
        log::log!(level, method:%, path, status, us, peer; "request");
    }
    Ok(response)
}

/// Counts a refused request, and returns whether it gets a log line of its own.
fn count_refusal(request: &HttpRequest) -> bool {
    let Some(api) = request.app_data::<Data<Api>>() else {
        return true;
    };
    let (is_logged, summary_after) = api.refusals.count();
    if let Some(after) = summary_after {
        let api = api.clone();
        actix_rt::spawn(async move {
            sleep(after).await;
            api.refusals.log_unlisted();
        });
    }
    is_logged
}

/// Returns the response to a request that is not authorized; `None` if it is.
fn unauthorized(request: &ServiceRequest) -> Option<HttpResponse> {
    if matches!(request.path(), "/is_alive" | "/is_alive/") {
        return None;
    }
    let Some(api) = request.app_data::<Data<Api>>() else {
        return Some(internal_error());
    };
    let header = request.headers().get(header::AUTHORIZATION).map(header::HeaderValue::as_bytes);
    let why = api.auth.check(header).err()?;
    let mut refusal = HttpResponse::Unauthorized();
    Some(refusal.insert_header((header::WWW_AUTHENTICATE, "Bearer")).json(why))
}

fn message(status: StatusCode, text: impl std::fmt::Display) -> HttpResponse {
    HttpResponse::build(status).json(json!({"message": text.to_string()}))
}

async fn not_found() -> HttpResponse {
    message(StatusCode::NOT_FOUND, "no such path")
}

async fn method_not_allowed(request: HttpRequest) -> HttpResponse {
    let pattern = request.match_pattern().unwrap_or_default();
    let path = pattern.strip_suffix('/').unwrap_or(&pattern);
    let allowed = ENDPOINTS.iter().find(|endpoint| endpoint.path == path).map(Endpoint::method);
    let allowed = allowed.unwrap_or(Method::GET);
    let mut response = message(
        StatusCode::METHOD_NOT_ALLOWED,
        format_args!("method {} is not allowed; allowed: {allowed}", request.method()),
    );
    if let Ok(allowed) = header::HeaderValue::from_str(allowed.as_str()) {
        response.headers_mut().insert(header::ALLOW, allowed);
    }
    response
}

/// The response when the intake is gone, as the agent is about to end.
fn internal_error() -> HttpResponse {
    message(StatusCode::INTERNAL_SERVER_ERROR, "the agent had an internal error")
}

async fn is_alive(api: Data<Api>) -> HttpResponse {
    let is_alive = api.intake.send(GetStatus).await.is_ok_and(|status| status.is_alive);
    let (status, word) =
        if is_alive { (StatusCode::OK, "yes") } else { (StatusCode::SERVICE_UNAVAILABLE, "no") };
    HttpResponse::build(status).content_type("text/plain; charset=utf-8").body(word)
}

async fn status(api: Data<Api>) -> HttpResponse {
    match api.intake.send(GetStatus).await {
        Ok(Status { state, waits_for, .. }) => {
            let version = env!("CARGO_PKG_VERSION");
            let mut status = json!({"state": state.as_str(), "version": version});
            if let Some(waits_for) = waits_for {
                status["waiting_for"] = waits_for.as_str().into();
            }
            HttpResponse::Ok().json(status)
        }
        Err(_) => internal_error(),
    }
}

async fn submit(request: HttpRequest, payload: Payload, api: Data<Api>) -> HttpResponse {
    let body = match read_body(&request, payload, api.max_body_size).await {
        Ok(body) => body,
        Err(refusal) => return refusal.into(),
    };
    let job = match parse(&body) {
        Ok(job) => job,
        Err(error) => return message(StatusCode::UNPROCESSABLE_ENTITY, WithCauses(&*error)),
    };
    drop(body);
    match api.intake.send(SubmitJob { job }).await {
        Ok(Ok(Submission::Started)) => message(StatusCode::OK, "ok"),
        Ok(Ok(Submission::AlreadyRunning)) => message(StatusCode::OK, "job is already running"),
        Ok(Err(refused)) => {
            let status = match refused {
                SubmitRefused::Unfit(_) | SubmitRefused::Busy => StatusCode::UNPROCESSABLE_ENTITY,
                SubmitRefused::Closed | SubmitRefused::Failed(_) | SubmitRefused::Crashed => {
                    StatusCode::SERVICE_UNAVAILABLE
                }
            };
            message(status, WithCauses(&refused))
        }
        Err(_) => internal_error(),
    }
}

/// Why the body of a request was not read to its end.
enum BodyRefused {
    TooLarge(usize),
    TooSlow,
    /// The agent is about to end, and does not wait for the rest.
    Ending,
    Broken(String),
}

impl From<BodyRefused> for HttpResponse {
    fn from(refused: BodyRefused) -> Self {
        match refused {
            BodyRefused::TooLarge(most) => message(
                StatusCode::PAYLOAD_TOO_LARGE,
                format_args!("the body exceeds the limit of {most} bytes"),
            ),
            BodyRefused::TooSlow => {
                message(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time")
            }
            BodyRefused::Ending => message(StatusCode::SERVICE_UNAVAILABLE, SubmitRefused::Closed),
            BodyRefused::Broken(why) => {
                message(StatusCode::BAD_REQUEST, format_args!("the body can't be read: {why}"))
            }
        }
    }
}

async fn read_body(
    request: &HttpRequest,
    payload: Payload,
    most: usize,
) -> Result<Bytes, BodyRefused> {
    let ending = async {
        match request.app_data::<GracefulShutdownSignal>() {
            Some(ending) => ending.notified().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        read = read_whole_body(request, payload, most) => read,
        () = ending => Err(BodyRefused::Ending),
    }
}

async fn read_whole_body(
    request: &HttpRequest,
    mut payload: Payload,
    most: usize,
) -> Result<Bytes, BodyRefused> {
    let announced = request.headers().get(header::CONTENT_LENGTH);
    let announced = announced.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > most as u64) {
        return Err(BodyRefused::TooLarge(most));
    }
    let deadline = Instant::now() + BODY_PATIENCE;
    let mut body = BytesMut::new();
    loop {
        let next = timeout_at(deadline, timeout(BODY_PART_PATIENCE, payload.next())).await;
        match next {
            Ok(Ok(None)) => return Ok(body.freeze()),
            Ok(Ok(Some(Ok(chunk)))) if body.len() + chunk.len() > most => {
                return Err(BodyRefused::TooLarge(most));
            }
            Ok(Ok(Some(Ok(chunk)))) => body.extend_from_slice(&chunk),
            Ok(Ok(Some(Err(error)))) => return Err(BodyRefused::Broken(error.to_string())),
            Ok(Err(_)) | Err(_) => return Err(BodyRefused::TooSlow),
        }
    }
}

/// Parses a job request. Errors name the place and the problem, but no value, which may be a secret.
fn parse(body: &[u8]) -> Result<Job, Cause> {
    let OnlyMap(request): OnlyMap<WireRequest> =
        decode_json(body, |tracked| naming_unknown(tracked))?;
    Ok(request.decode()?)
}

async fn log(id: Option<web::Path<String>>, request: HttpRequest, api: Data<Api>) -> HttpResponse {
    let mut parameters = request.query_string().split('&');
    let line = parameters.find_map(|parameter| parameter.strip_prefix("start_from="));
    let line = line.map_or(0, line_number);
    let Some(id) = id.and_then(|id| JobId::new(id.into_inner())) else {
        return not_found().await;
    };
    let range = match api.intake.send(ReadJobLog { id: id.clone(), line }).await {
        Ok(Ok(range)) => range,
        Ok(Err(refused)) => {
            let status = match refused {
                ReadRefused::NoJob => StatusCode::NOT_FOUND,
                ReadRefused::OtherJob => StatusCode::FORBIDDEN,
                ReadRefused::Broken(_) => StatusCode::INTERNAL_SERVER_ERROR,
            };
            return message(status, WithCauses(&refused));
        }
        Err(_) => return internal_error(),
    };
    let mut body = FileBody::new(Arc::clone(&range.source), range.start, range.end);
    let compress = accepts_gzip(&request) && range.end - range.start >= MIN_COMPRESSED_SIZE;
    if compress {
        body = body.compressed();
    }
    // A start line past the end cannot be a read of this log; do not count it as archiving.
    if range.sealed && line <= range.next_line && is_archivator(&request) {
        let report = TransferReport::begin(api.intake.clone(), id);
        // Every connection has a handover.
        if let Some(handover) = request.conn_data::<Rc<Handover>>() {
            body = body.reported(report, Rc::clone(handover));
        }
    }
    text(body, compress)
}

/// Parses the parameter `start_from`. Anything but digits counts as 0, and a number that is too large is past
/// the end of every log.
fn line_number(text: &str) -> u64 {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return 0;
    }
    text.parse().unwrap_or(u64::MAX)
}

fn is_archivator(request: &HttpRequest) -> bool {
    request.headers().get("X-Client-Name").is_some_and(|name| name == "archivator")
}

fn text(body: FileBody, compressed: bool) -> HttpResponse {
    let mut response = HttpResponse::Ok();
    response.content_type("text/plain; charset=utf-8");
    response.insert_header((header::VARY, "Accept-Encoding"));
    if compressed {
        response.insert_header((header::CONTENT_ENCODING, "gzip"));
    }
    response.body(body)
}

fn unreadable(error: &io::Error) -> HttpResponse {
    message(StatusCode::INTERNAL_SERVER_ERROR, format_args!("the log can't be read: {error}"))
}

/// Returns whether `Accept-Encoding` names gzip with a weight above 0.
fn accepts_gzip(request: &HttpRequest) -> bool {
    let values = request.headers().get_all(header::ACCEPT_ENCODING);
    values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(',')).any(
        |coding| {
            let mut parts = coding.split(';').map(str::trim);
            let named = parts.next().is_some_and(|name| name.eq_ignore_ascii_case("gzip"));
            let weight = parts.find_map(|part| part.strip_prefix("q="));
            named
                && weight
                    .and_then(|weight| weight.parse::<f32>().ok())
                    .is_none_or(|weight| weight > 0.0)
        },
    )
}

#[derive(Default, Deserialize)]
struct StopBody {
    job_hash_id: Option<Value>,
}

async fn stop(request: HttpRequest, payload: Payload, api: Data<Api>) -> HttpResponse {
    let body = match read_body(&request, payload, api.max_body_size).await {
        Ok(body) => body,
        Err(refusal) => return refusal.into(),
    };
    // Any body that names no job, even one that is not JSON, stops the running job.
    let named = serde_json::from_slice::<StopBody>(&body).unwrap_or_default().job_hash_id;
    let id = named.and_then(|id| match id {
        Value::String(id) => JobId::new(id),
        // An id of another type still names a certain job, so it must not stop a different one.
        other => JobId::new(other.to_string()),
    });
    match api.intake.send(RequestStop { id }).await {
        Ok(()) => message(StatusCode::OK, "ok"),
        Err(_) => internal_error(),
    }
}

async fn agent_logs(request: HttpRequest, api: Data<Api>) -> HttpResponse {
    let Some(path) = &api.agent_log else {
        return message(StatusCode::NOT_FOUND, "the agent writes no log file");
    };
    let opened = open_to_read(path).and_then(|file| Ok((file.metadata()?.len(), file)));
    match opened {
        Ok((length, file)) => {
            let body = FileBody::new(Arc::new(OpenFile(file)), 0, length);
            let compress = accepts_gzip(&request) && length >= MIN_COMPRESSED_SIZE;
            text(if compress { body.compressed() } else { body }, compress)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            message(StatusCode::NOT_FOUND, "the agent's log file is gone")
        }
        Err(error) => unreadable(&error),
    }
}
