//! Passing a question on: all resolvers that know about it are asked at once, and the first good answer wins (the
//! client dossier, section 8.4). None is asked that would only send the question back here.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::Name;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::loops::{Asked, Doubt, Loops};
use crate::secure::Secure;
use crate::state::{DnsState, Upstream};

/// A whole question, everything included.
const TOTAL: Duration = Duration::from_secs(10);
/// Without an answer by UDP after this, TCP is tried too: something on the way may drop the one.
const UDP_PATIENCE: Duration = Duration::from_secs(2);
const TCP_LIMIT: Duration = Duration::from_secs(5);
/// For a probe to come back: by then the question goes on its way without a verdict.
const PROBE: Duration = Duration::from_secs(1);
/// A message's fixed part.
const HEADER: usize = 12;
/// The largest answer by UDP that is taken.
const UDP_ANSWER: usize = 4096;

/// What became of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Forwarded {
    Answer(Vec<u8>),
    /// Everybody refused or failed.
    Failed(ResponseCode),
    /// Nobody answered at all.
    Silence,
}

/// What decides by which way a resolver is reached for a name.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    state: Arc<DnsState>,
    name: Arc<str>,
}

impl Way {
    pub(crate) fn new(state: Arc<DnsState>, name: &str) -> Self {
        Self { state, name: name.into() }
    }

    pub(crate) fn for_name(&self, name: &str) -> Self {
        Self { state: Arc::clone(&self.state), name: name.into() }
    }

    pub(crate) fn state(&self) -> &DnsState {
        &self.state
    }

    /// Is the name one that the mesh itself hangs on?
    pub(crate) fn is_outside(&self) -> bool {
        self.state.is_outside(&self.name)
    }
}

/// Asks resolvers.
#[derive(Debug, Default)]
pub(crate) struct Forwarder {
    /// Mark of the sockets, so that they stay out of the tunnel.
    pub(crate) fwmark: Option<u32>,
    pub(crate) loops: Loops,
    pub(crate) secure: Secure,
}

impl Forwarder {
    /// A resolver that is reached through the mesh must not be kept out of it.
    pub(crate) fn mark(&self, to: IpAddr, way: &Way) -> Option<u32> {
        self.fwmark.filter(|_| !way.state.asks_inside(&way.name, to))
    }

    /// Asks all of them, for a client by TCP again where the answer was cut.
    pub(crate) async fn forward(
        self: &Arc<Self>,
        query: &[u8],
        kind: u16,
        tcp: bool,
        mut upstreams: Vec<Upstream>,
        way: &Way,
    ) -> Forwarded {
        let failed = Forwarded::Failed(ResponseCode::ServFail);
        let leads_back = |upstream: &Upstream| self.loops.is_loop(upstream, &way.name, Instant::now());
        upstreams.retain(|upstream| !leads_back(upstream));
        if upstreams.is_empty() {
            return failed;
        }
        let _asking = match self.loops.begin((way.name.to_string(), kind), &upstreams) {
            Ok(asking) => Some(asking),
            Err(first) => {
                if self.comes_back(&first, kind, way).await {
                    return failed;
                }
                upstreams.retain(|upstream| !leads_back(upstream));
                None
            }
        };
        let forwarded = self.ask(query, false, &upstreams, way).await;
        if tcp && matches!(&forwarded, Forwarded::Answer(answer) if is_truncated(answer)) {
            return self.ask(query, true, &upstreams, way).await;
        }
        forwarded
    }

    /// The same question waits for answers already. Does it come from the resolvers that it waits for, all of them?
    async fn comes_back(self: &Arc<Self>, first: &Asked, kind: u16, way: &Way) -> bool {
        let probed = async {
            match self.loops.doubt(&way.name, first, Instant::now()) {
                Doubt::Known => {}
                Doubt::Wait => first.probed.cancelled().await,
                Doubt::Probe(probes) => {
                    let mut tasks = JoinSet::new();
                    for (upstream, name) in probes {
                        let Some(query) = probe(&name, kind) else { continue };
                        let (forwarder, way) = (Arc::clone(self), way.clone());
                        tasks.spawn(async move { forwarder.one(&query, false, &upstream, &way).await });
                    }
                    while tasks.join_next().await.is_some() {}
                    first.probed.cancel();
                }
            }
        };
        tokio::select! {
            _ = timeout(PROBE, probed) => {}
            () = first.done.cancelled() => {}
        }
        let now = Instant::now();
        first.upstreams.iter().all(|upstream| self.loops.is_loop(upstream, &way.name, now))
    }

    async fn ask(self: &Arc<Self>, query: &[u8], tcp: bool, upstreams: &[Upstream], way: &Way) -> Forwarded {
        let mut tasks = JoinSet::new();
        for upstream in upstreams {
            let (forwarder, query) = (Arc::clone(self), query.to_vec());
            let (upstream, way) = (upstream.clone(), way.clone());
            tasks.spawn(async move {
                let answer = forwarder.one(&query, tcp, &upstream, &way).await;
                (upstream, answer)
            });
        }
        let mut worst = None;
        let race = async {
            while let Some(done) = tasks.join_next().await {
                match done {
                    Ok((upstream, Ok(answer))) => match code(&answer) {
                        Some(ResponseCode::Refused) => drop(worst.get_or_insert(ResponseCode::Refused)),
                        Some(ResponseCode::ServFail) => worst = Some(ResponseCode::ServFail),
                        Some(_) => {
                            self.loops.answered(&upstream, &way.name);
                            return Some(answer);
                        }
                        None => {}
                    },
                    Ok((upstream, Err(error))) => {
                        tracing::debug!(%upstream, %error, "no answer from a resolver");
                    }
                    Err(error) => tracing::debug!(%error, "a question was not asked"),
                }
            }
            None
        };
        match timeout(TOTAL, race).await {
            Ok(Some(answer)) => Forwarded::Answer(answer),
            Ok(None) => worst.map_or(Forwarded::Failed(ResponseCode::ServFail), Forwarded::Failed),
            Err(_) => Forwarded::Silence,
        }
    }

    async fn one(
        self: &Arc<Self>,
        query: &[u8],
        tcp: bool,
        upstream: &Upstream,
        way: &Way,
    ) -> io::Result<Vec<u8>> {
        match upstream {
            Upstream::Plain(to) => plain(query, tcp, *to, self.mark(to.ip(), way)).await,
            Upstream::Secure(to) => self.by_secure(query, to, way).await.map_err(io::Error::other),
            Upstream::Unusable { why, .. } => Err(io::Error::other(*why)),
        }
    }
}

/// A question by which a loop is found.
fn probe(name: &str, kind: u16) -> Option<Vec<u8>> {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(format!("{name}.")).ok()?, kind.into()));
    message.to_vec().ok()
}

fn code(answer: &[u8]) -> Option<ResponseCode> {
    answer.get(3).map(|flags| ResponseCode::from_low(flags & 0x0f))
}

fn is_truncated(answer: &[u8]) -> bool {
    answer.get(2).is_some_and(|flags| flags & 0x02 != 0)
}

async fn plain(query: &[u8], tcp: bool, to: SocketAddr, fwmark: Option<u32>) -> io::Result<Vec<u8>> {
    if tcp {
        return by_tcp(query, to, fwmark).await;
    }
    let patient = async {
        sleep(UDP_PATIENCE).await;
        by_tcp(query, to, fwmark).await
    };
    let udp = by_udp(query, to, fwmark);
    tokio::pin!(udp, patient);
    tokio::select! {
        answer = &mut udp => answer,
        answer = &mut patient => match answer {
            Ok(answer) => Ok(answer),
            // Many resolvers of homes have no TCP: a slow answer may still come.
            Err(error) => {
                tracing::debug!(%to, %error, "no answer by TCP");
                udp.await
            }
        },
    }
}

pub(crate) fn socket(
    to: SocketAddr,
    kind: Type,
    protocol: Protocol,
    fwmark: Option<u32>,
) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(to), kind, Some(protocol))?;
    socket.set_nonblocking(true)?;
    if let Some(mark) = fwmark.filter(|_| !to.ip().is_loopback()) {
        socket.set_mark(mark)?;
    }
    Ok(socket)
}

async fn by_udp(query: &[u8], to: SocketAddr, fwmark: Option<u32>) -> io::Result<Vec<u8>> {
    // A new socket for each question: its port is as random as the kernel makes it.
    let socket = socket(to, Type::DGRAM, Protocol::UDP, fwmark)?;
    let any: SocketAddr =
        if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { (std::net::Ipv6Addr::UNSPECIFIED, 0).into() };
    socket.bind(&any.into())?;
    let socket = UdpSocket::from_std(socket.into())?;
    socket.connect(to).await?;
    let id = random_id();
    socket.send(&with_id(query, id)).await?;
    let mut buffer = vec![0; UDP_ANSWER];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let answer = &buffer[..length];
        if length == buffer.len() && id_of(answer) == id {
            // Longer than what is taken, and so cut by the kernel.
            return by_tcp(query, to, fwmark).await;
        }
        if answers(query, answer, id) {
            return Ok(with_id(answer, id_of(query)));
        }
    }
}

async fn by_tcp(query: &[u8], to: SocketAddr, fwmark: Option<u32>) -> io::Result<Vec<u8>> {
    let exchange = async {
        let socket = socket(to, Type::STREAM, Protocol::TCP, fwmark)?;
        let mut stream = TcpSocket::from_std_stream(socket.into()).connect(to).await?;
        let id = random_id();
        let mut framed = (query.len() as u16).to_be_bytes().to_vec();
        framed.extend_from_slice(&with_id(query, id));
        stream.write_all(&framed).await?;
        let length = stream.read_u16().await?;
        let mut answer = vec![0; length.into()];
        stream.read_exact(&mut answer).await?;
        if !answers(query, &answer, id) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is to another question"));
        }
        Ok(with_id(&answer, id_of(query)))
    };
    timeout(TCP_LIMIT, exchange).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

pub(crate) fn random_id() -> u16 {
    let nonce = lacis_wire::derp::random_nonce();
    u16::from_be_bytes([nonce[0], nonce[1]])
}

pub(crate) fn id_of(message: &[u8]) -> u16 {
    u16::from_be_bytes([message.first().copied().unwrap_or(0), message.get(1).copied().unwrap_or(0)])
}

pub(crate) fn with_id(message: &[u8], id: u16) -> Vec<u8> {
    let mut copy = message.to_vec();
    if let Some(place) = copy.get_mut(..2) {
        place.copy_from_slice(&id.to_be_bytes());
    }
    copy
}

/// Is this an answer to that question? The id alone can be guessed. Only header and question are read: what is in the
/// records is the asker's matter.
pub(crate) fn answers(query: &[u8], answer: &[u8], id: u16) -> bool {
    if answer.len() < HEADER || id_of(answer) != id || answer[2] & 0x80 == 0 {
        return false;
    }
    match [answer[4], answer[5]] {
        // Some servers leave the question out of an error.
        [0, 0] => code(answer) != Some(ResponseCode::NoError),
        [0, 1] => question(query)
            .zip(question(answer))
            .is_some_and(|(asked, told)| asked.0.eq_ignore_ascii_case(told.0) && asked.1 == told.1),
        _ => false,
    }
}

/// Name of the first question, and its type and class.
pub(crate) fn question(message: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut end = HEADER;
    loop {
        match usize::from(*message.get(end)?) {
            0 => break,
            // The first name in a message has nothing to point at.
            label @ 1..64 => end += 1 + label,
            _ => return None,
        }
    }
    end += 1;
    Some((&message[HEADER..end], message.get(end..end + 4)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::{Message, Query};
    use hickory_proto::rr::{Name, RecordType};
    use proptest::prelude::*;

    fn message(name: &str, kind: RecordType, answer: bool) -> Vec<u8> {
        let mut message = Message::query();
        message.metadata.id = 7;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        let mut bytes = message.to_vec().unwrap();
        bytes[2] |= u8::from(answer) << 7;
        bytes
    }

    #[test]
    fn an_answer_repeats_id_and_question() {
        let query = message("www.example.", RecordType::A, false);
        let answer = message("WWW.example.", RecordType::A, true);
        assert!(answers(&query, &answer, 7));
        // Records that nobody here can read do not matter.
        assert!(answers(&query, &[&answer[..], b"what?"].concat(), 7));
        assert!(!answers(&query, &answer, 8));
        assert!(!answers(&query, &query, 7), "a question is no answer");
        assert!(!answers(&query, &message("www.example.", RecordType::AAAA, true), 7));
        assert!(!answers(&query, &message("ww.example.", RecordType::A, true), 7));
        assert!(!answers(&query, &answer[..20], 7));
        let mut bare = answer[..HEADER].to_vec();
        bare[4..6].fill(0);
        assert!(!answers(&query, &bare, 7));
        bare[3] = 2;
        assert!(answers(&query, &bare, 7), "an error may come without its question");
    }

    proptest! {
        #[test]
        fn no_answer_makes_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = (answers(&bytes, &bytes, id_of(&bytes)), question(&bytes));
        }
    }
}
