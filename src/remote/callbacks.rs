//! Sends callbacks over HTTP or HTTPS.

use std::time::Duration;

use actors::ports::{Callback, CallbackError, CallbackSender};
use awc::http::header::{self, HeaderValue};
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use tokio::time::timeout;

use crate::remote::http_client::{HttpClients, parse_url, words_of_send_error};

/// How long a platform may take to answer one callback.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long the body of an answer may take whose status says everything.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A client of platforms.
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
            Err(error) => return unusable(&format!("no TLS: {error}")),
        };
        let mut request =
            client.post(url).insert_header((header::CONTENT_TYPE, "application/json"));
        if let Some(token) = &callback.token {
            let Ok(bearer) = HeaderValue::try_from(format!("Bearer {token}")) else {
                return unusable("its token can't stand in a header");
            };
            request = request.insert_header((header::AUTHORIZATION, bearer));
        }
        let request = request.send_body(callback.body.clone());
        async {
            let mut response = request
                .await
                .map_err(|error| CallbackError::Failed(words_of_send_error(&error)))?;
            if !response.status().is_success() {
                return Err(CallbackError::Failed(format!("the answer is {}", response.status())));
            }
            // Read, so that the connection can be used again; what it says is of no interest.
            let _ = timeout(LAST_WORDS, response.body().limit(64 * 1024)).await;
            Ok(())
        }
        .boxed_local()
    }
}
