//! A node of a network as the server sees one: keys, a Noise session, registrations and map requests. It has no tunnel.
//!
//! [`crate::load`] makes thousands of them; [`crate::hostile`] sends through them what no client does.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::{Response, StatusCode};
use lacis_wire::CURRENT_CAPABILITY_VERSION;
use lacis_wire::control::{
    self, Hostinfo, MapRequest, NetInfo, RegisterAuth, RegisterRequest, RegisterResponse,
};
use lacis_wire::io::{ControlClient, ControlDialer};
use lacis_wire::key::{DiscoPrivateKey, MachineKey, MachinePrivateKey, NodePrivateKey};
use lacis_wire::mapframe::{Compression, Decoder};

/// How long a server may take to answer one request under load.
const REQUEST_LIMIT: Duration = Duration::from_mins(1);

/// One node and its session.
#[derive(Debug)]
pub(crate) struct Node {
    control: ControlClient,
    key: NodePrivateKey,
    disco: DiscoPrivateKey,
    hostname: String,
}

impl Node {
    /// Dials the server with a machine key; without the server's key it is asked for that first.
    pub(crate) async fn dial(
        url: &str,
        machine: MachinePrivateKey,
        server_key: Option<MachineKey>,
        hostname: String,
    ) -> Result<Self> {
        let dialer = ControlDialer::new(url, machine)?.timeout(REQUEST_LIMIT);
        let stream = dialer.dial(server_key).await.with_context(|| hostname.clone())?;
        let (control, _connection) = ControlClient::new(dialer.url(), stream).await?;
        Ok(Self { control, key: NodePrivateKey::generate(), disco: DiscoPrivateKey::generate(), hostname })
    }

    /// The node's key.
    pub(crate) fn key(&self) -> &NodePrivateKey {
        &self.key
    }

    /// Whether the session has ended.
    pub(crate) fn is_closed(&self) -> bool {
        self.control.is_closed()
    }

    /// Joins with an auth key.
    pub(crate) async fn register(&self, auth_key: &str) -> Result<()> {
        let request = RegisterRequest {
            auth: Some(RegisterAuth { auth_key: auth_key.to_owned() }),
            ..self.register_request()
        };
        let body = self.answer("/machine/register", control::to_json(&request)).await?;
        let answer: RegisterResponse = serde_json::from_slice(&body.collect().await?.to_bytes())?;
        ensure!(answer.error.is_empty(), "{} was refused: {}", self.hostname, answer.error);
        ensure!(answer.machine_authorized, "{} was not authorized: is the auth key good?", self.hostname);
        Ok(())
    }

    /// A registration without anything that lets the node join.
    pub(crate) fn register_request(&self) -> RegisterRequest {
        RegisterRequest {
            version: CURRENT_CAPABILITY_VERSION,
            node_key: self.key.public(),
            hostinfo: Some(self.hostinfo()),
            ..RegisterRequest::default()
        }
    }

    fn hostinfo(&self) -> Hostinfo {
        Hostinfo {
            os: "linux".to_owned(),
            hostname: self.hostname.clone(),
            net_info: Some(NetInfo { preferred_derp: 999, ..NetInfo::default() }),
            ..Hostinfo::default()
        }
    }

    /// A map request as clients send it; `omit_peers` makes it one that only reports.
    pub(crate) fn map_request(&self, endpoint: SocketAddr, omit_peers: bool) -> MapRequest {
        MapRequest {
            version: CURRENT_CAPABILITY_VERSION,
            compress: "zstd".to_owned(),
            node_key: self.key.public(),
            disco_key: Some(self.disco.public()),
            hostinfo: Some(self.hostinfo()),
            endpoints: Some(vec![endpoint]),
            endpoint_types: vec![control::endpoint_type::STUN],
            omit_peers,
            ..MapRequest::default()
        }
    }

    /// Opens the map stream.
    pub(crate) async fn stream(&self, endpoint: SocketAddr) -> Result<Incoming> {
        let request = MapRequest { stream: true, keep_alive: true, ..self.map_request(endpoint, false) };
        self.answer("/machine/map", control::to_json(&request)).await
    }

    /// Sends a request; whatever the answer is.
    pub(crate) async fn post(&self, path: &str, request: Vec<u8>) -> Result<Response<Incoming>> {
        Ok(tokio::time::timeout(REQUEST_LIMIT, self.control.post(path, request))
            .await
            .with_context(|| format!("{path}: no answer in {} s", REQUEST_LIMIT.as_secs()))??)
    }

    /// Sends a request and reads the whole answer; its status.
    pub(crate) async fn status(&self, path: &str, request: Vec<u8>) -> Result<StatusCode> {
        let response = self.post(path, request).await?;
        let status = response.status();
        response.into_body().collect().await?;
        Ok(status)
    }

    /// Sends a request that must be taken; the body of the answer.
    pub(crate) async fn answer(&self, path: &str, request: Vec<u8>) -> Result<Incoming> {
        let response = self.post(path, request).await?;
        let status = response.status();
        if !status.is_success() {
            let text = response.into_body().collect().await?.to_bytes();
            bail!("{path}: {status}: {}", String::from_utf8_lossy(&text));
        }
        Ok(response.into_body())
    }
}

/// Reads a map stream to its end: the length of each piece as it came over HTTP, and each message.
pub(crate) async fn read(
    mut body: Incoming,
    mut received: impl FnMut(usize),
    mut message: impl FnMut(&[u8]),
) -> Result<()> {
    let mut decoder = Decoder::new(Compression::Zstd);
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        received(data.len());
        decoder.push(&data);
        while let Some(next) = decoder.next_message()? {
            message(&next);
        }
    }
    Ok(())
}
