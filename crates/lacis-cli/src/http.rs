//! HTTP over a Unix socket, one request a connection.

use std::io;
use std::path::PathBuf;

use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

/// What can go wrong between here and a daemon.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot connect to {what} at {}: {source} ({hint})", path.display())]
    Connect { what: &'static str, path: PathBuf, source: io::Error, hint: &'static str },
    #[error("{what} did not answer: {source}")]
    Http { what: &'static str, source: hyper::Error },
    #[error("{what} answers what makes no sense: {source}")]
    Answer { what: &'static str, source: serde_json::Error },
    /// In the daemon's own words.
    #[error("{text}")]
    Refused { status: StatusCode, text: String },
    #[error("the request cannot be made: {0}")]
    Request(#[from] http::Error),
}

/// Somebody who listens on a Unix socket.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    pub path: PathBuf,
    pub what: &'static str,
    pub host: &'static str,
    /// What to do when nobody listens.
    pub start: &'static str,
    /// What to do when one may not ask.
    pub permission: &'static str,
    /// Flags that commands in its hints need to mean the same server and network, each with a blank before it.
    pub flags: String,
}

impl Server {
    /// Sends a request; the answer's body is still to be read.
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, Error> {
        let stream = UnixStream::connect(&self.path).await.map_err(|source| {
            let denied = source.kind() == io::ErrorKind::PermissionDenied;
            let hint = if denied { self.permission } else { self.start };
            Error::Connect { what: self.what, path: self.path.clone(), source, hint }
        })?;
        let http = |source| Error::Http { what: self.what, source };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::HOST, self.host)
            .header(http::header::CONTENT_TYPE, "application/json")
            .header("Tailscale-Cap", lacis_wire::CURRENT_CAPABILITY_VERSION)
            .body(Full::new(Bytes::from(body)))?;
        let response = sender.send_request(request).await.map_err(http)?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body = self.read(response).await?;
        Err(Error::Refused { status, text: self.refusal(status, &body) })
    }

    /// The words of a refusal, whatever form they have.
    fn refusal(&self, status: StatusCode, body: &[u8]) -> String {
        let json: Option<serde_json::Value> = serde_json::from_slice(body).ok();
        let member = |name: &str| json.as_ref()?.get(name)?.as_str().map(ToOwned::to_owned);
        let plain = String::from_utf8_lossy(body).trim().to_owned();
        let text = member("error").or_else(|| member("Error")).unwrap_or(plain);
        match (text.is_empty(), member("hint")) {
            (true, _) => format!("{} answers {status}", self.what),
            (false, Some(hint)) => {
                let hint = hint.replace("`lacis admin ", &format!("`lacis admin{} ", self.flags));
                format!("{text} ({hint})")
            }
            (false, None) => text,
        }
    }

    async fn read(&self, response: Response<Incoming>) -> Result<Bytes, Error> {
        let body = response.into_body().collect().await;
        Ok(body.map_err(|source| Error::Http { what: self.what, source })?.to_bytes())
    }

    /// Sends a request and reads the JSON that comes back.
    pub(crate) async fn json<T: serde::de::DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<T, Error> {
        let bytes = self.read(self.send(method, path, body).await?).await?;
        serde_json::from_slice(&bytes).map_err(|source| Error::Answer { what: self.what, source })
    }

    /// Sends a request whose answer has nothing in it.
    pub(crate) async fn empty(&self, method: Method, path: &str, body: Vec<u8>) -> Result<(), Error> {
        let response = self.send(method, path, body).await?;
        self.read(response).await.map(drop)
    }
}

/// A text inside a path or a query.
pub(crate) fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().fold(String::new(), |mut out, byte| {
        if plain(byte) {
            out.push(byte.into());
        } else {
            out.push_str(&format_byte(byte));
        }
        out
    })
}

fn format_byte(byte: u8) -> String {
    format!("%{byte:02X}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_but_plain_characters_is_escaped() {
        assert_eq!(escaped("a-b_1.c"), "a-b_1.c");
        assert_eq!(escaped("fd7a::1/x y"), "fd7a%3A%3A1%2Fx%20y");
    }

    #[test]
    fn refusals_are_told_in_the_daemons_words() {
        let flags = " --tailnet lab".to_owned();
        let server = Server { path: "/x".into(), what: "lacisd", host: "", start: "", permission: "", flags };
        let words = |body: &str| server.refusal(StatusCode::BAD_REQUEST, body.as_bytes());
        assert_eq!(words("plain\n"), "plain");
        assert_eq!(words(r#"{"Error":"no"}"#), "no");
        assert_eq!(words(r#"{"error":"no","hint":"try that"}"#), "no (try that)");
        let hinted = words(r#"{"error":"no","hint":"see `lacis admin nodes list`"}"#);
        assert_eq!(hinted, "no (see `lacis admin --tailnet lab nodes list`)");
        assert!(words("").contains("400"));
    }
}
