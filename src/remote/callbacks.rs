//! Sends callbacks over HTTP or HTTPS.

use std::time::Duration;

use actors::ports::{Callback, CallbackError, CallbackSender};
use awc::http::header::{self, HeaderValue};
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use tokio::time::timeout;

use crate::remote::http_client::{HttpClients, describe_send_error, parse_url};

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

impl CallbackSender for HttpCallbacks {
    fn send(&self, callback: &Callback) -> LocalBoxFuture<'static, Result<(), CallbackError>> {
        let unusable = |why: &str| {
            std::future::ready(Err(CallbackError::Unusable(why.to_owned()))).boxed_local()
        };
        let url = match parse_url(&callback.url) {
            Ok(url) => url,
            Err(why) => return unusable(why),
        };
        let client = match self.clients.for_url(&url) {
            Ok(client) => client,
            Err(error) => return unusable(&format!("TLS setup failed: {error}")),
        };
        let mut request =
            client.post(url).insert_header((header::CONTENT_TYPE, "application/json"));
        if let Some(token) = &callback.token {
            let Ok(bearer) = HeaderValue::try_from(format!("Bearer {token}")) else {
                return unusable("the token contains characters that are invalid in a header");
            };
            request = request.insert_header((header::AUTHORIZATION, bearer));
        }
        let request = request.send_body(callback.body.clone());
        async {
            let mut response = request
                .await
                .map_err(|error| CallbackError::Failed(describe_send_error(&error)))?;
            if !response.status().is_success() {
                return Err(CallbackError::Failed(format!(
                    "the server answered {}",
                    response.status()
                )));
            }
            // The body is ignored, but must be read before the connection can be used again.
            let _ = timeout(BODY_PATIENCE, response.body().limit(64 * 1024)).await;
            Ok(())
        }
        .boxed_local()
    }
}
