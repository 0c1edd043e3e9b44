//! Sends callbacks over HTTP or HTTPS.

use std::time::Duration;

use actors::ports::{Callback, CallbackError, CallbackSender};
use awc::ClientRequest;
use awc::http::header;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use tokio::time::timeout;

use crate::remote::http_client::{HttpClients, HttpError, authorization, parse_url};

/// Time limit of one callback, from connecting to the response headers.
const PATIENCE: Duration = Duration::from_secs(30);

/// Time limit for reading the body of a successful response. The status has decided already, so a slow body
/// is not worth more.
const BODY_PATIENCE: Duration = Duration::from_secs(1);

/// Sends callbacks with direct connections, which are kept open for the next callbacks.
pub struct HttpCallbacks {
    clients: HttpClients,
}

impl Default for HttpCallbacks {
    fn default() -> Self {
        Self { clients: HttpClients::new(PATIENCE) }
    }
}

impl HttpCallbacks {
    fn request(&self, callback: &Callback) -> Result<ClientRequest, HttpError> {
        let url = parse_url(&callback.url)?;
        let mut request = self.clients.for_url(&url)?.post(url);
        request = request.insert_header((header::CONTENT_TYPE, "application/json"));
        if let Some(token) = &callback.token {
            request =
                request.insert_header((header::AUTHORIZATION, authorization("Bearer", token)?));
        }
        Ok(request)
    }
}

impl CallbackSender for HttpCallbacks {
    fn send(&self, callback: &Callback) -> LocalBoxFuture<'static, Result<(), CallbackError>> {
        let request =
            self.request(callback).map(|request| request.send_body(callback.body.clone()));
        async {
            let request = request.map_err(|error| CallbackError::Permanent(error.into()))?;
            let transient = |error: HttpError| CallbackError::Transient(error.into());
            let mut response = request.await.map_err(|error| transient(error.into()))?;
            if !response.status().is_success() {
                return Err(transient(HttpError::from_status(response.status())));
            }
            // The body is ignored, but must be read before the connection can be used again.
            let _ = timeout(BODY_PATIENCE, response.body().limit(64 * 1024)).await;
            Ok(())
        }
        .boxed_local()
    }
}
