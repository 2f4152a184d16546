//! Resolvers that are asked over HTTPS ([`https`], RFC 8484) and TLS ([`tls`], RFC 7858): one connection to each, which is
//! kept for further questions, opened by one question at a time, and opened again where it has ended unseen.

mod https;
#[cfg(test)]
mod tests;
mod tls;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RData, RecordType};
use http::StatusCode;
use lacis_wire::io::{DialError, client_config, native_roots, tls_error};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use socket2::{Protocol, Type};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;

use crate::forward::{Forwarded, Forwarder, Way, socket};
use crate::state::{SecureUpstream, Upstream};

/// Connections at a time; the one that was not used for the longest time gives way.
const MAX_CONNECTIONS: usize = 16;
/// For the host's name, TCP and TLS.
const CONNECT: Duration = Duration::from_secs(5);
/// For an answer.
const ANSWER: Duration = Duration::from_secs(5);
/// An unused connection is closed.
const IDLE: Duration = Duration::from_mins(1);
/// After a failure nobody tries again for so long.
const PAUSE: Duration = Duration::from_secs(1);
/// How long one address may hold up the next (RFC 8305 recommends 250 ms).
const NEXT_ADDRESS: Duration = Duration::from_millis(250);
/// The longest message.
const MAX_MESSAGE: usize = 0xffff;
/// Resolvers whose failures are kept.
const MAX_FAILURES: usize = 64;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SecureError {
    #[error("the address of {host} cannot be found: {why}")]
    Resolve { host: String, why: &'static str },
    #[error("no connection to {address}: {source}")]
    Connect { address: SocketAddr, source: io::Error },
    #[error(transparent)]
    Tls(#[from] DialError),
    #[error("it does not speak HTTP/2, which DNS over HTTPS needs")]
    NoHttp2,
    #[error("it answers {0}, and no DNS message (is the URL's path right?)")]
    Status(StatusCode),
    #[error("what it answers is no DNS message to the question")]
    NotDns,
    #[error("the connection has failed: {0}")]
    Broken(String),
    #[error("no {what} within {after:?}")]
    Late { what: &'static str, after: Duration },
}

/// A connection. Cheap to clone.
#[derive(Clone, Debug)]
enum Connection {
    Http(https::Client),
    Tls(tls::Client),
}

impl Connection {
    fn is_closed(&self) -> bool {
        match self {
            Self::Http(client) => client.is_closed(),
            Self::Tls(client) => client.is_closed(),
        }
    }

    async fn ask(&self, query: &[u8]) -> Result<Vec<u8>, SecureError> {
        let answer = async {
            match self {
                Self::Http(client) => client.ask(query).await,
                Self::Tls(client) => client.ask(query).await,
            }
        };
        timeout(ANSWER, answer).await.unwrap_or(Err(SecureError::Late { what: "answer", after: ANSWER }))
    }
}

/// The place of one resolver's connection.
#[derive(Debug)]
struct Slot {
    used: Mutex<Instant>,
    state: tokio::sync::Mutex<SlotState>,
}

#[derive(Debug, Default)]
struct SlotState {
    connection: Option<Connection>,
    /// Counts the connections.
    number: u64,
    failed: Option<(Instant, Arc<SecureError>)>,
}

impl Slot {
    fn new() -> Self {
        Self { used: Mutex::new(Instant::now()), state: tokio::sync::Mutex::default() }
    }

    fn used(&self) -> MutexGuard<'_, Instant> {
        locked(&self.used)
    }
}

/// A resolver, and whether it is asked for what the mesh itself hangs on, which goes another way.
type Key = (Arc<SecureUpstream>, bool);

/// All connections.
#[derive(Debug, Default)]
pub(crate) struct Secure {
    slots: Mutex<HashMap<Key, Arc<Slot>>>,
    failures: Mutex<HashMap<Arc<SecureUpstream>, Arc<SecureError>>>,
    /// What TLS needs, once it was read from the system.
    tls: Mutex<Option<rustls::RootCertStore>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Secure {
    /// Trusts these authorities instead of the system's.
    #[cfg(test)]
    pub(crate) fn with_roots(roots: rustls::RootCertStore) -> Self {
        Self { tls: Mutex::new(Some(roots)), ..Self::default() }
    }

    /// Closes all connections: the next question opens a new one.
    pub(crate) fn clear(&self) {
        locked(&self.slots).clear();
    }

    /// Forgets resolvers that are not asked any more.
    pub(crate) fn retain(&self, is_asked: impl Fn(&Upstream) -> bool) {
        let is_asked = |to: &Arc<SecureUpstream>| is_asked(&Upstream::Secure(Arc::clone(to)));
        locked(&self.slots).retain(|(to, _), _| is_asked(to));
        locked(&self.failures).retain(|to, _| is_asked(to));
    }

    /// Resolvers that could not be asked the last time.
    pub(crate) fn problems(&self) -> Vec<String> {
        let failures = locked(&self.failures);
        failures
            .iter()
            .map(|(to, error)| format!("the resolver {} cannot be asked: {error}", to.url))
            .collect()
    }

    fn slot(&self, to: &Arc<SecureUpstream>, outside: bool) -> Arc<Slot> {
        let mut slots = locked(&self.slots);
        let key = (Arc::clone(to), outside);
        if let Some(slot) = slots.get(&key) {
            *slot.used() = Instant::now();
            return Arc::clone(slot);
        }
        if slots.len() >= MAX_CONNECTIONS
            && let Some(idlest) =
                slots.iter().min_by_key(|(_, slot)| *slot.used()).map(|(key, _)| key.clone())
        {
            slots.remove(&idlest);
        }
        Arc::clone(slots.entry(key).or_insert_with(|| Arc::new(Slot::new())))
    }

    fn failed(&self, to: &Arc<SecureUpstream>, error: &Arc<SecureError>) {
        let mut failures = locked(&self.failures);
        if failures.len() < MAX_FAILURES && failures.insert(Arc::clone(to), Arc::clone(error)).is_none() {
            tracing::warn!(resolver = %to.url, %error, "this resolver cannot be asked");
        }
    }

    fn works(&self, to: &Arc<SecureUpstream>) {
        if locked(&self.failures).remove(to).is_some() {
            tracing::info!(resolver = %to.url, "this resolver can be asked again");
        }
    }

    /// The settings for one connection. The authorities are read once.
    fn tls(&self, alpn: &[&[u8]]) -> Result<Arc<ClientConfig>, DialError> {
        let mut known = locked(&self.tls);
        let roots = match &*known {
            Some(roots) => roots.clone(),
            None => known.insert(native_roots()?).clone(),
        };
        client_config(roots, alpn)
    }

    /// An authority may be installed after it was missed.
    fn forget_authorities(&self) {
        if !cfg!(test) {
            *locked(&self.tls) = None;
        }
    }
}

impl Forwarder {
    /// Asks over the resolver's connection.
    pub(crate) async fn by_secure(
        self: &Arc<Self>,
        query: &[u8],
        to: &Arc<SecureUpstream>,
        way: &Way,
    ) -> Result<Vec<u8>, Arc<SecureError>> {
        let slot = self.secure.slot(to, way.is_outside());
        let mut last = 0;
        loop {
            let connected =
                tokio::spawn(Arc::clone(self).connected(slot.clone(), to.clone(), way.clone(), last));
            // Should another resolver answer first, then this one is connected for the next question all the same.
            let connected =
                connected.await.unwrap_or_else(|error| Err(Arc::new(SecureError::Broken(error.to_string()))));
            let (connection, number, is_new) = connected?;
            let error = match connection.ask(query).await {
                Ok(answer) => {
                    self.secure.works(to);
                    return Ok(answer);
                }
                Err(error) => error,
            };
            let unusable = matches!(error, SecureError::Broken(_) | SecureError::Late { .. });
            if unusable && !is_new && last == 0 {
                // It may have ended without a word.
                tracing::debug!(resolver = %to.url, %error, "a kept connection fails: trying another one");
                last = number;
                continue;
            }
            if unusable {
                let mut state = slot.state.lock().await;
                if state.number == number {
                    state.connection = None;
                }
            }
            let error = Arc::new(error);
            self.secure.failed(to, &error);
            return Err(error);
        }
    }

    /// The connection that stands, or a new one in place of none or of the one with the number `not`. With its number,
    /// and whether it is new.
    async fn connected(
        self: Arc<Self>,
        slot: Arc<Slot>,
        to: Arc<SecureUpstream>,
        way: Way,
        not: u64,
    ) -> Result<(Connection, u64, bool), Arc<SecureError>> {
        let mut state = slot.state.lock().await;
        if let Some(connection) = &state.connection
            && state.number != not
            && !connection.is_closed()
        {
            return Ok((connection.clone(), state.number, false));
        }
        if let Some((at, error)) = &state.failed
            && at.elapsed() < PAUSE
        {
            return Err(Arc::clone(error));
        }
        state.connection = None;
        let opened = timeout(CONNECT, self.open(&to, &way, &slot)).await;
        match opened.unwrap_or(Err(SecureError::Late { what: "connection", after: CONNECT })) {
            Ok(connection) => {
                state.number += 1;
                state.failed = None;
                state.connection = Some(connection.clone());
                self.secure.works(&to);
                Ok((connection, state.number, true))
            }
            Err(error) => {
                if matches!(error, SecureError::Tls(_)) {
                    self.secure.forget_authorities();
                }
                let error = Arc::new(error);
                state.failed = Some((Instant::now(), Arc::clone(&error)));
                self.secure.failed(&to, &error);
                Err(error)
            }
        }
    }

    async fn open(
        self: &Arc<Self>,
        to: &Arc<SecureUpstream>,
        way: &Way,
        slot: &Arc<Slot>,
    ) -> Result<Connection, SecureError> {
        let addresses = match to.addresses.as_slice() {
            [] => Arc::clone(self).addresses(to.host.clone(), way.clone()).await?,
            known => known.to_vec(),
        };
        let tcp = self.connect(&addresses, to.port, way).await?;
        let alpn: &[&[u8]] = if to.path.is_some() { &[https::ALPN] } else { &[] };
        let name = ServerName::try_from(to.host.clone())
            .map_err(|_| SecureError::Resolve { host: to.host.clone(), why: "it is no name of a host" })?;
        let connector = TlsConnector::from(self.secure.tls(alpn)?);
        let stream = connector.connect(name, tcp).await.map_err(|error| tls_error(&to.host, &error))?;
        match &to.path {
            Some(path) => {
                Ok(Connection::Http(https::Client::new(stream, to, path, Arc::downgrade(slot)).await?))
            }
            None => Ok(Connection::Tls(tls::Client::new(stream))),
        }
    }

    /// TCP to the first address that accepts, each tried a little after the one before.
    async fn connect(&self, addresses: &[IpAddr], port: u16, way: &Way) -> Result<TcpStream, SecureError> {
        let mut attempts = JoinSet::new();
        let mut rest = addresses.iter().map(|ip| SocketAddr::new(*ip, port));
        let mut last = None;
        loop {
            let next = rest.next();
            if let Some(address) = next {
                let mark = self.mark(address.ip(), way);
                attempts.spawn(async move {
                    let connected = async {
                        let socket = socket(address, Type::STREAM, Protocol::TCP, mark)?;
                        TcpSocket::from_std_stream(socket.into()).connect(address).await
                    };
                    let stream =
                        connected.await.map_err(|source| SecureError::Connect { address, source })?;
                    // What is small must not wait for more; where it cannot be said it goes as well.
                    let _ = stream.set_nodelay(true);
                    Ok(stream)
                });
            }
            tokio::select! {
                Some(attempt) = attempts.join_next() => match attempt {
                    Ok(Ok(stream)) => return Ok(stream),
                    Ok(Err(error)) => last = Some(error),
                    Err(error) => last = Some(SecureError::Broken(error.to_string())),
                },
                () = sleep(NEXT_ADDRESS), if rest.len() > 0 => {}
                else => return Err(last.unwrap_or(SecureError::Resolve {
                    host: String::new(),
                    why: "it has no address",
                })),
            }
        }
    }

    /// The addresses of a resolver's host: a node's, or as the plain resolvers have them.
    fn addresses(
        self: Arc<Self>,
        host: String,
        way: Way,
    ) -> Pin<Box<dyn Future<Output = Result<Vec<IpAddr>, SecureError>> + Send>> {
        // Boxed: looking up leads to forwarding, and forwarding here.
        Box::pin(async move {
            if let Some(known) = way.state().addresses(&host) {
                return Ok(known);
            }
            let failed = |why| SecureError::Resolve { host: host.clone(), why };
            let upstreams = way.state().bootstrap();
            if upstreams.is_empty() {
                return Err(failed("no resolver is known that is asked without it"));
            }
            let name =
                Name::from_ascii(format!("{host}.")).map_err(|_| failed("it is no name of the DNS"))?;
            let way = way.for_name(&host);
            let (v4, v6) = tokio::join!(
                self.lookup(&name, RecordType::A, &upstreams, &way),
                self.lookup(&name, RecordType::AAAA, &upstreams, &way),
            );
            match (v4, v6) {
                (None, None) => Err(failed("the resolvers that this host has beside it do not answer")),
                (v4, v6) => {
                    let all: Vec<_> = v4.into_iter().chain(v6).flatten().collect();
                    if all.is_empty() { Err(failed("there is no such name")) } else { Ok(all) }
                }
            }
        })
    }

    async fn lookup(
        self: &Arc<Self>,
        name: &Name,
        kind: RecordType,
        upstreams: &[Upstream],
        way: &Way,
    ) -> Option<Vec<IpAddr>> {
        let mut query = Message::query();
        query.metadata.recursion_desired = true;
        query.add_query(Query::query(name.clone(), kind));
        let Forwarded::Answer(answer) =
            self.forward(&query.to_vec().ok()?, kind.into(), false, upstreams.to_vec(), way).await
        else {
            return None;
        };
        let address = |data: &RData| match data {
            RData::A(ip) => Some(IpAddr::V4(ip.0)),
            RData::AAAA(ip) => Some(IpAddr::V6(ip.0)),
            _ => None,
        };
        let answer = Message::from_vec(&answer).ok()?;
        Some(answer.answers.iter().filter_map(|record| address(&record.data)).collect())
    }
}
