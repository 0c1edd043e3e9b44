//! The routes, and the answers of the protocol.

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
use crate::api::transfer::{AnswerBody, FileBody, TransferReport};
use crate::decode::{decode_json, naming_unknown};
use crate::service::own_log::open_to_read;
use crate::state::log_file::OpenFile;

/// A request that has an answer.
struct Handled {
    /// In small letters.
    method: &'static str,
    path: &'static str,
    by: fn(Route) -> Route,
}

const HANDLED: [Handled; 7] = [
    Handled { method: "get", path: "/is_alive", by: |route| route.to(is_alive) },
    Handled { method: "get", path: "/status", by: |route| route.to(status) },
    Handled { method: "post", path: "/jobs", by: |route| route.to(submit) },
    Handled { method: "get", path: "/jobs/{id}/log", by: |route| route.to(log) },
    Handled { method: "post", path: "/stop", by: |route| route.to(stop) },
    Handled { method: "post", path: "/jobs/terminate", by: |route| route.to(stop) },
    Handled { method: "get", path: "/agent_logs", by: |route| route.to(agent_logs) },
];

impl Handled {
    fn method(&self) -> Method {
        if self.method == "get" { Method::GET } else { Method::POST }
    }
}

/// Every request that has an answer: its method and its path.
pub const ROUTES: [(&str, &str); HANDLED.len()] = {
    let mut routes = [("", ""); HANDLED.len()];
    let mut index = 0;
    while index < routes.len() {
        routes[index] = (HANDLED[index].method, HANDLED[index].path);
        index += 1;
    }
    routes
};

/// How long a client may send nothing of a body, and how long the whole of it may take.
const BODY_IDLE: Duration = Duration::from_secs(20);
const BODY_WHOLE: Duration = Duration::from_mins(10);

/// Bodies of less are not worth compressing, in bytes.
const WORTH_COMPRESSING: u64 = 1024;

/// The application for one worker.
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
    let mut app = App::new().app_data(api).app_data(ending).wrap(from_fn(guarded));
    for handled in HANDLED {
        let with_slash = format!("{}/", handled.path);
        let route = (handled.by)(web::method(handled.method()));
        let resource = web::resource([handled.path, with_slash.as_str()]).route(route);
        app = app.service(resource.default_service(web::to(method_not_allowed)));
    }
    app.default_service(web::to(not_found))
}

/// How much of a request's method and path stands in the agent's own log, in bytes.
const SHOWN: usize = 200;

/// The answers of those who have read the whole body of their request.
const BODY_WAS_READ: [StatusCode; 4] = [
    StatusCode::OK,
    StatusCode::UNPROCESSABLE_ENTITY,
    StatusCode::INTERNAL_SERVER_ERROR,
    StatusCode::SERVICE_UNAVAILABLE,
];

/// Whether the request announces a body.
fn has_body(request: &ServiceRequest) -> bool {
    let headers = request.headers();
    let length = headers.get(header::CONTENT_LENGTH);
    headers.contains_key(header::TRANSFER_ENCODING) || length.is_some_and(|length| length != "0")
}

/// Checks who asks, and notes the request in the agent's log.
async fn guarded(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let began = Instant::now();
    // Long ones would push everything else out of the log.
    let shown = |text: &str| text[..text.floor_char_boundary(SHOWN)].to_owned();
    let (method, path) = (shown(request.method().as_str()), shown(request.path()));
    let peer = request.peer_addr().map_or_else(String::new, |peer| peer.to_string());
    let handover = request.request().conn_data::<Rc<Handover>>().map(Rc::clone);
    if let Some(handover) = &handover {
        handover.request_begins();
    }
    let (has_body, is_post) = (has_body(&request), request.method() == Method::POST);
    let answer = match unauthorized(&request) {
        Some(refusal) => Ok(request.into_response(refusal)),
        None => next.call(request).await.map(ServiceResponse::map_into_boxed_body),
    };
    let mut answer = answer?;
    let is_read = is_post && BODY_WAS_READ.contains(&answer.status());
    if has_body && !is_read {
        // The rest of the body would be waited for, however long it takes.
        answer.response_mut().head_mut().set_connection_type(ConnectionType::Close);
        if let Some(handover) = &handover {
            handover.close_after_answer();
        }
    }
    let answer = answer.map_body(|_, body| match handover {
        Some(handover) => AnswerBody { body, handover }.boxed(),
        None => body,
    });
    let status = answer.status().as_u16();
    let us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    // A platform asks for these all the time.
    let level = if path.starts_with("/is_alive") { log::Level::Debug } else { log::Level::Info };
    let is_refused = answer.status() == StatusCode::UNAUTHORIZED;
    if !is_refused || is_to_be_listed(answer.request()) {
        log::log!(level, method:%, path, status, us, peer; "request");
    }
    Ok(answer)
}

/// Whether a refused request is to have a line of its own.
fn is_to_be_listed(request: &HttpRequest) -> bool {
    let Some(api) = request.app_data::<Data<Api>>() else {
        return true;
    };
    let (is_listed, told_after) = api.refusals.note();
    if let Some(after) = told_after {
        let api = api.clone();
        actix_rt::spawn(async move {
            sleep(after).await;
            api.refusals.tell();
        });
    }
    is_listed
}

fn unauthorized(request: &ServiceRequest) -> Option<HttpResponse> {
    if matches!(request.path(), "/is_alive" | "/is_alive/") {
        return None;
    }
    let Some(api) = request.app_data::<Data<Api>>() else {
        return Some(broken());
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
    message(StatusCode::NOT_FOUND, "there is nothing at this path")
}

async fn method_not_allowed(request: HttpRequest) -> HttpResponse {
    let pattern = request.match_pattern().unwrap_or_default();
    let path = pattern.strip_suffix('/').unwrap_or(&pattern);
    let allowed = HANDLED.iter().find(|handled| handled.path == path).map(Handled::method);
    let allowed = allowed.unwrap_or(Method::GET);
    let mut answer = message(
        StatusCode::METHOD_NOT_ALLOWED,
        format_args!("method {} is not allowed; allowed: {allowed}", request.method()),
    );
    if let Ok(allowed) = header::HeaderValue::from_str(allowed.as_str()) {
        answer.headers_mut().insert(header::ALLOW, allowed);
    }
    answer
}

/// The intake is gone: the agent is about to end.
fn broken() -> HttpResponse {
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
        Err(_) => broken(),
    }
}

async fn submit(request: HttpRequest, payload: Payload, api: Data<Api>) -> HttpResponse {
    let body = match read_body(&request, payload, api.max_body_size).await {
        Ok(body) => body,
        Err(refusal) => return refusal.into(),
    };
    let job = match parse(&body) {
        Ok(job) => job,
        Err(why) => return message(StatusCode::UNPROCESSABLE_ENTITY, why),
    };
    drop(body);
    match api.intake.send(SubmitJob { job }).await {
        Ok(Ok(Submission::Started)) => message(StatusCode::OK, "ok"),
        Ok(Ok(Submission::AlreadyRunning)) => message(StatusCode::OK, "job is already running"),
        Ok(Err(refused)) => {
            let status = match refused {
                SubmitRefused::Unfit(_) | SubmitRefused::Busy => StatusCode::UNPROCESSABLE_ENTITY,
                SubmitRefused::Closed | SubmitRefused::Broken(_) => StatusCode::SERVICE_UNAVAILABLE,
            };
            message(status, refused)
        }
        Err(_) => broken(),
    }
}

/// Why a body was not read.
enum BodyRefused {
    TooLarge(usize),
    TooSlow,
    /// The agent is about to end, and waits for nobody who still sends.
    Ending,
    Broken(String),
}

impl From<BodyRefused> for HttpResponse {
    fn from(refused: BodyRefused) -> Self {
        match refused {
            BodyRefused::TooLarge(most) => message(
                StatusCode::PAYLOAD_TOO_LARGE,
                format_args!("the body is larger than {most} bytes, the most that is taken"),
            ),
            BodyRefused::TooSlow => {
                message(StatusCode::REQUEST_TIMEOUT, "the body did not come in time")
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
    let deadline = Instant::now() + BODY_WHOLE;
    let mut body = BytesMut::new();
    loop {
        let next = timeout_at(deadline, timeout(BODY_IDLE, payload.next())).await;
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

/// Reads a job request; says what is wrong and where, but no value: it may be a secret.
fn parse(body: &[u8]) -> Result<Job, String> {
    let OnlyMap(request): OnlyMap<WireRequest> =
        decode_json(body, |tracked| naming_unknown(tracked)).map_err(|error| error.to_string())?;
    request.decode().map_err(|error| error.to_string())
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
            return message(status, refused);
        }
        Err(_) => return broken(),
    };
    let mut body = FileBody::new(Arc::clone(&range.source), range.start, range.end);
    let compress = accepts_gzip(&request) && range.end - range.start >= WORTH_COMPRESSING;
    if compress {
        body = body.compressed();
    }
    // Who asks for what is beyond the end has another log in mind.
    if range.sealed && line <= range.next_line && is_archivator(&request) {
        let report = TransferReport::begin(api.intake.clone(), id);
        // Each connection has one.
        if let Some(handover) = request.conn_data::<Rc<Handover>>() {
            body = body.reported(report, Rc::clone(handover));
        }
    }
    text(body, compress)
}

/// What is no number is 0, and one that is too large is beyond every log.
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
    let mut answer = HttpResponse::Ok();
    answer.content_type("text/plain; charset=utf-8");
    answer.insert_header((header::VARY, "Accept-Encoding"));
    if compressed {
        answer.insert_header((header::CONTENT_ENCODING, "gzip"));
    }
    answer.body(body)
}

fn unreadable(error: &io::Error) -> HttpResponse {
    message(StatusCode::INTERNAL_SERVER_ERROR, format_args!("the log can't be read: {error}"))
}

/// Whether gzip is among the accepted codings, and not with a weight of 0.
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
    // A body that names no job means the one that runs, whatever else it is.
    let named = serde_json::from_slice::<StopBody>(&body).unwrap_or_default().job_hash_id;
    let id = named.and_then(|id| match id {
        Value::String(id) => JobId::new(id),
        // Whatever it is, it means a certain job.
        other => JobId::new(other.to_string()),
    });
    match api.intake.send(RequestStop { id }).await {
        Ok(()) => message(StatusCode::OK, "ok"),
        Err(_) => broken(),
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
            let compress = accepts_gzip(&request) && length >= WORTH_COMPRESSING;
            text(if compress { body.compressed() } else { body }, compress)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            message(StatusCode::NOT_FOUND, "the agent's log file is gone")
        }
        Err(error) => unreadable(&error),
    }
}
