//! The control plane's response to each request, and the state that it records.

use std::io::{self, Read as _};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use actix_web::dev::Extensions;
use actix_web::http::{Method, StatusCode, header};
use actix_web::web::{Bytes, Data};
use actix_web::{HttpRequest, HttpResponse};
use flate2::read::GzDecoder;
use serde_json::{Value, json};

use super::{API, Fault, HubAgent, Known, LOGS, ReceivedRequest, SANITIZED, State};

/// Keeps a handle of each connection, so that a fault can close the connection without a response.
pub(super) fn remember_connection(connection: &dyn std::any::Any, data: &mut Extensions) {
    if let Some(stream) = connection.downcast_ref::<actix_web::rt::net::TcpStream>()
        && let Ok(descriptor) = stream.as_fd().try_clone_to_owned()
    {
        data.insert(Arc::new(TcpStream::from(descriptor)));
    }
}

pub(super) async fn answer(request: HttpRequest, body: Bytes, state: Data<State>) -> HttpResponse {
    let path = request.path().to_owned();
    let received = ReceivedRequest::new(&request, &body);
    let number = {
        let mut known = state.known();
        known.requests.push(received.clone());
        known.requests.len() - 1
    };
    state.changed.notify_all();
    let fault = state.fault(&received, number);
    match fault {
        Some(Fault::Status(status)) => {
            state.answered(number, status);
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            return HttpResponse::build(status).finish();
        }
        Some(Fault::Nonsense) => {
            state.answered(number, 200);
            return HttpResponse::Ok().body("<html>{\"action\":");
        }
        Some(Fault::Refuse(status, why)) => {
            state.answered(number, status);
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            return HttpResponse::build(status).content_type("text/plain").body(why);
        }
        Some(Fault::Page) => {
            state.answered(number, 200);
            let page = "<!DOCTYPE html>\n<html><body>Please log in</body></html>\n";
            return HttpResponse::Ok().content_type("text/html").body(page);
        }
        Some(Fault::Drop) => return close(&request),
        Some(Fault::Delay(delay)) => actix_web::rt::time::sleep(delay).await,
        Some(Fault::Cut | Fault::Lost) | None => {}
    }
    let (status, answer) = if let Some(id) = path.strip_prefix(LOGS) {
        take_log(&state, id, &request, &body)
    } else if let Some(path) = path.strip_prefix(API) {
        serve_agent(&state, request.method(), path, &request, &body)
    } else {
        (404, Value::Null)
    };
    state.answered(number, status);
    if fault == Some(Fault::Lost) {
        return close(&request);
    }
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = HttpResponse::build(status);
    if state.settings().compression {
        response.insert_header((header::ACCEPT_ENCODING, "gzip"));
    }
    if fault == Some(Fault::Cut) {
        let text = format!("{answer}{}", " ".repeat(100));
        let half = Bytes::from(text[..text.len() / 2].to_owned());
        let broken = Err(io::Error::from(io::ErrorKind::ConnectionAborted));
        let parts = futures_util::stream::iter([Ok(half), broken]);
        let size = u64::try_from(text.len()).unwrap_or(u64::MAX);
        return response.body(actix_web::body::SizedStream::new(size, parts));
    }
    response.json(answer)
}

/// Closes the connection without a response.
fn close(request: &HttpRequest) -> HttpResponse {
    if let Some(stream) = request.conn_data::<Arc<TcpStream>>() {
        let _ = stream.shutdown(Shutdown::Both);
    }
    HttpResponse::Ok().finish()
}

fn header_of<'a>(request: &'a HttpRequest, name: &str) -> &'a str {
    request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

fn take_log(state: &State, id: &str, request: &HttpRequest, body: &[u8]) -> (u16, Value) {
    let (quota, memory, most_lines) = {
        let settings = state.settings();
        (settings.log_quota, settings.memory, settings.most_lines)
    };
    let mut known = state.known();
    if header_of(request, "authorization") != format!("Bearer {}", known.log_token()) {
        return (401, Value::Null);
    }
    known.log_bodies.push(body.len());
    let mut text = Vec::new();
    if header_of(request, "content-encoding") == "gzip" {
        if GzDecoder::new(body).read_to_end(&mut text).is_err() {
            return (400, Value::Null);
        }
    } else {
        text.extend_from_slice(body);
    }
    let lines: Vec<Vec<u8>> =
        text.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
    if lines.len() > most_lines {
        return (413, Value::Null);
    }
    let start = request.query_string().strip_prefix("start_from=");
    let Some(start) = start.and_then(|start| start.parse::<usize>().ok()) else {
        return (400, Value::Null);
    };
    let Some(job) = known.jobs.get_mut(id) else {
        return (404, Value::Null);
    };
    if (start > job.log.len() && !job.has_holes) || !text.ends_with(b"\n") {
        return (400, Value::Null);
    }
    let start = start.min(job.log.len());
    let size: usize = job.log[..start].iter().map(Vec::len).sum();
    if size + text.len() > quota || memory_of(&job.log[..start]) > memory {
        return (422, Value::Null);
    }
    let already = job.log.len();
    job.log.truncate(start);
    job.log.extend(lines);
    for line in job.log.iter().skip(already) {
        match serde_json::from_slice::<Value>(line) {
            Ok(event) => show_event(state, id, &event),
            Err(error) => {
                (state.events)(&format!("{id}: a line of the log is not JSON: {error}\n"));
            }
        }
    }
    (200, Value::Null)
}

/// Returns the memory that the log store estimates for these lines: it keeps them in nodes of at most 8 KiB
/// (a longer line gets its own node), and extrapolates from the first five nodes.
fn memory_of(lines: &[Vec<u8>]) -> usize {
    const NODE: usize = 8 << 10;
    const SAMPLED: usize = 5;
    let mut nodes: Vec<usize> = Vec::new();
    for line in lines {
        match nodes.last_mut() {
            Some(node) if *node + line.len() <= NODE => *node += line.len(),
            _ => nodes.push(line.len()),
        }
    }
    let sampled = nodes.len().clamp(1, SAMPLED);
    nodes.iter().take(sampled).sum::<usize>() * nodes.len() / sampled
}

fn show_event(state: &State, id: &str, event: &Value) {
    let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
    (state.events)(&match event["event"].as_str() {
        Some("job_started") => format!("── {id} runs\n"),
        Some("cmd_started") => format!("▶ {}\n", text("directive")),
        Some("cmd_output") => text("output"),
        Some("cmd_finished") => format!("  exit code {}\n", event["exit_code"]),
        _ => format!("── {id} {}\n", text("result")),
    });
}

fn serve_agent(
    state: &State,
    method: &Method,
    path: &str,
    request: &HttpRequest,
    body: &[u8],
) -> (u16, Value) {
    let authorization = header_of(request, "authorization");
    let Some(token) = authorization.strip_prefix("Token ") else {
        return (401, Value::Null);
    };
    let body: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    if path == "/register" {
        return register(state, token, body);
    }
    let mut known = state.known();
    let Some(index) = known.agents.iter().position(|agent| agent.token == token) else {
        return (401, Value::Null);
    };
    match (method.as_str(), path) {
        ("POST", "/sync") => (200, sync(state, &mut known, index, &body)),
        ("POST", "/refresh") => (200, json!({ "token": known.log_token() })),
        ("POST", "/disconnect") => {
            let agent = known.agents.remove(index);
            known.disconnected += 1;
            (state.events)(&format!("── {} has left\n", agent.registration["name"]));
            (200, Value::Null)
        }
        ("GET", path) => {
            let token = known.log_token();
            let id = path.strip_prefix("/jobs/").unwrap_or_default();
            let Some(job) = known.jobs.get_mut(id) else {
                return (404, Value::Null);
            };
            job.fetched += 1;
            let mut request = job.request.clone();
            // A test may have set its own logger.
            if request["logger"].is_null() {
                let url = format!("http://{}{LOGS}{id}", state.address);
                request["logger"] = json!({ "method": "push", "url": url, "token": token });
            }
            if state.settings().once && job.fetched > 1 {
                sanitize(&mut request);
            }
            (200, request)
        }
        _ => (404, Value::Null),
    }
}

/// Overwrites the secrets in a request that was handed out before.
fn sanitize(part: &mut Value) {
    match part {
        Value::Object(fields) => {
            for (name, field) in fields {
                if field.is_string() && ["value", "content", "token"].contains(&name.as_str()) {
                    *field = SANITIZED.into();
                } else {
                    sanitize(field);
                }
            }
        }
        Value::Array(parts) => parts.iter_mut().for_each(sanitize),
        _ => {}
    }
}

fn register(state: &State, token: &str, body: Value) -> (u16, Value) {
    if token != state.settings().token {
        return (401, Value::Null);
    }
    let mut known = state.known();
    let name = body["name"].clone();
    let token = format!("access-token-{}", known.registrations.len());
    (state.events)(&format!("── {name} is there\n"));
    known.registrations.push(body.clone());
    known.agents.push(HubAgent { registration: body, token: token.clone(), job: None });
    (201, json!({ "name": name, "token": token }))
}

fn sync(state: &State, known: &mut Known, index: usize, report: &Value) -> Value {
    known.reports.push(report.clone());
    known.answered.push(SystemTime::now());
    let mut answer = match known.answers.pop_front() {
        Some(answer) => answer,
        None => decide(known, index, report),
    };
    if let Some(fields) = answer.as_object_mut() {
        fields.entry("next_sync_after").or_insert_with(|| state.settings().next_sync_after.into());
    }
    answer
}

fn action(name: &str) -> Value {
    json!({ "action": name })
}

fn decide(known: &mut Known, index: usize, report: &Value) -> Value {
    let id = report["job_id"].as_str().unwrap_or_default();
    let interrupted_at = report["interrupted_at"].as_u64().unwrap_or(0);
    let registration = known.agents[index].registration.clone();
    let shutdown = |reason: &str| json!({ "action": "shutdown", "shutdown_reason": reason });
    match report["state"].as_str() {
        Some("waiting-for-jobs") => {
            if interrupted_at > 0 {
                return shutdown("interrupted");
            }
            if let Some(reason) = &known.shutdown {
                return shutdown(reason);
            }
            // A job that was assigned, but has not reached the agent, comes first.
            let job = known.agents[index].job.take().or_else(|| known.queue.pop_front());
            known.agents[index].job.clone_from(&job);
            job.map_or_else(
                || action("continue"),
                |id| json!({ "action": "run-job", "job_id": id }),
            )
        }
        Some("finished-job") => {
            known.agents[index].job = None;
            if let Some(job) = known.jobs.get_mut(id) {
                job.result = report["job_result"].as_str().map(str::to_owned);
            }
            if interrupted_at > 0 {
                shutdown("interrupted")
            } else if registration["single_job"] == true {
                shutdown("job-finished")
            } else {
                action("wait-for-jobs")
            }
        }
        Some("starting-job" | "running-job") => {
            let grace = registration["interruption_grace_period"].as_u64().unwrap_or(0);
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs());
            let is_over = interrupted_at > 0 && now >= interrupted_at + grace;
            if is_over || known.jobs.get(id).is_some_and(|job| job.stop) {
                json!({ "action": "stop-job", "job_id": id })
            } else {
                action("continue")
            }
        }
        _ => action("continue"),
    }
}
