//! Answers DNS messages: from the state where it can, by passing them on where it must.

use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;
use hickory_proto::op::{Message, MessageType, ResponseCode};

use crate::answer::{Decision, decide, failed};
use crate::forward::{Forwarded, Forwarder, Way};
use crate::state::DnsState;

/// The largest UDP answer that is offered and taken.
pub(crate) const MAX_UDP: u16 = 1232;
/// What a client without EDNS takes.
pub(crate) const PLAIN_UDP: u16 = 512;
/// Resolvers that are complained of one by one.
const MAX_PROBLEMS: usize = 8;
/// The shortest message: a header.
pub(crate) const HEADER: usize = 12;
/// The shortest question: the root's name, type, class.
const MIN_QUESTION: usize = 5;
/// The shortest record: the same, a time to live, and the length of its data.
const MIN_RECORD: usize = 11;

/// How a question came, and so how large its answer may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

/// How questions are passed on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Mark of the sockets, so that they stay out of the tunnel.
    pub fwmark: Option<u32>,
}

/// The resolver. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Resolver {
    pub(crate) state: Arc<ArcSwap<DnsState>>,
    forwarder: Arc<Forwarder>,
}

impl Resolver {
    pub fn new(options: Options) -> Self {
        Self::with(Forwarder { fwmark: options.fwmark, ..Forwarder::default() })
    }

    pub(crate) fn with(forwarder: Forwarder) -> Self {
        Self { state: Arc::default(), forwarder: Arc::new(forwarder) }
    }

    /// Answers with this from now on.
    pub fn set_state(&self, state: Arc<DnsState>) {
        let old = self.state.swap(Arc::clone(&state));
        if old.inside != state.inside {
            // Kept connections may have been made by another way.
            self.reconnect();
        }
        self.forwarder.loops.retain(|upstream| state.has(upstream));
        self.forwarder.secure.retain(|upstream| state.has(upstream));
    }

    /// The host's network is another: kept connections to resolvers are closed.
    pub fn reconnect(&self) {
        self.forwarder.secure.clear();
    }

    /// What does not work, in lines for people.
    pub fn problems(&self) -> Vec<String> {
        let mut problems: Vec<_> = self.state().problems().into_iter().collect();
        let loops = self.forwarder.loops.found(Instant::now());
        problems.extend(loops.into_iter().map(|(upstream, name)| {
            format!(
                "the resolver {upstream} sends this node's questions back to it ({name}, for one): it must not ask \
                 100.100.100.100, or this node must not ask it"
            )
        }));
        problems.extend(self.forwarder.secure.problems());
        if let Some(more) = problems.len().checked_sub(MAX_PROBLEMS).filter(|more| *more > 0) {
            problems.truncate(MAX_PROBLEMS);
            problems.push(format!("and {more} more problems with resolvers"));
        }
        problems
    }

    pub fn state(&self) -> Arc<DnsState> {
        self.state.load_full()
    }

    /// Answers at once, if nobody else must be asked; otherwise the question comes back.
    pub(crate) fn answer_here(
        &self,
        query: &[u8],
        transport: Transport,
    ) -> Result<Option<Vec<u8>>, Box<Question>> {
        let message = match counts_fit(query).then(|| Message::from_vec(query)) {
            Some(Ok(message)) if message.metadata.message_type == MessageType::Query => message,
            // An answer is no question: saying anything could go on for ever.
            Some(Ok(_)) => return Ok(None),
            Some(Err(_)) | None => return Ok(unreadable(query)),
        };
        match decide(&self.state(), &message) {
            Decision::Answer(answer) => Ok(encode(&answer, &message, transport)),
            Decision::Forward(name) if self.forwarder.loops.returned(&name, Instant::now()) => {
                Ok(encode(&failed(&message, ResponseCode::NXDomain), &message, transport))
            }
            Decision::Forward(name) => {
                Err(Box::new(Question { name, message, bytes: query.to_vec(), transport }))
            }
        }
    }

    /// Answers a DNS message; `None` when there is nothing to say.
    pub async fn answer(&self, query: &[u8], transport: Transport) -> Option<Vec<u8>> {
        match self.answer_here(query, transport) {
            Ok(answer) => answer,
            Err(question) => self.pass_on(question).await,
        }
    }

    pub(crate) async fn pass_on(&self, question: Box<Question>) -> Option<Vec<u8>> {
        let Question { name, message, bytes, transport } = *question;
        let state = self.state();
        let upstreams = state.upstreams(&name);
        // `decide` has let through exactly one.
        let kind = message.queries.first().map_or(0, |question| question.query_type.into());
        let tcp = transport == Transport::Tcp;
        let way = Way::new(state, &name);
        let forwarded = self.forwarder.forward(&bytes, kind, tcp, upstreams, &way).await;
        match forwarded {
            Forwarded::Answer(answer) => fitted(answer, &message, transport),
            Forwarded::Failed(code) => encode(&failed(&message, code), &message, transport),
            Forwarded::Silence => {
                tracing::debug!(%name, "no resolver answers");
                encode(&failed(&message, ResponseCode::ServFail), &message, transport)
            }
        }
    }
}

/// A question for somebody else.
#[derive(Debug)]
pub(crate) struct Question {
    name: String,
    message: Message,
    bytes: Vec<u8>,
    transport: Transport,
}

/// Can what the header counts be in a message of this length? The decoder makes room for all of it before it reads.
fn counts_fit(message: &[u8]) -> bool {
    let Some(header) = message.first_chunk::<HEADER>() else { return false };
    let count = |at: usize| usize::from(u16::from_be_bytes([header[at], header[at + 1]]));
    let records = count(6) + count(8) + count(10);
    HEADER + count(4) * MIN_QUESTION + records * MIN_RECORD <= message.len()
}

/// What can be said to a message that makes no sense, if its header does.
fn unreadable(query: &[u8]) -> Option<Vec<u8>> {
    if query.len() < HEADER || query[2] & 0x80 != 0 {
        return None;
    }
    let mut answer = vec![0; HEADER];
    answer[..2].copy_from_slice(&query[..2]);
    // A response with the same opcode and "recursion desired", and the code FORMERR.
    answer[2] = 0x80 | query[2] & 0x79;
    answer[3] = 1;
    Some(answer)
}

/// How much the asker takes by UDP.
fn limit(query: &Message) -> usize {
    query.edns.as_ref().map_or(PLAIN_UDP, |edns| edns.max_payload().clamp(PLAIN_UDP, MAX_UDP)).into()
}

fn encode(answer: &Message, query: &Message, transport: Transport) -> Option<Vec<u8>> {
    let bytes =
        answer.to_vec().inspect_err(|error| tracing::debug!(%error, "an answer cannot be written")).ok()?;
    if transport == Transport::Udp && bytes.len() > limit(query) {
        return answer.truncate().to_vec().ok();
    }
    Some(bytes)
}

/// An answer of somebody else, or word that it is longer than the asker takes.
fn fitted(answer: Vec<u8>, query: &Message, transport: Transport) -> Option<Vec<u8>> {
    let takes = query.edns.as_ref().map_or(PLAIN_UDP, |edns| edns.max_payload().max(PLAIN_UDP));
    if transport == Transport::Tcp || answer.len() <= takes.into() {
        return Some(answer);
    }
    let code = answer.get(3).map_or(ResponseCode::ServFail, |flags| ResponseCode::from_low(flags & 0x0f));
    failed(query, code).truncate().to_vec().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::net::{IpAddr, Ipv4Addr, SocketAddr};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use hickory_proto::op::Query;
    use hickory_proto::rr::rdata::A;
    use hickory_proto::rr::{Name, RData, Record, RecordType};
    use proptest::prelude::*;
    use tokio::net::UdpSocket;

    use crate::state::Upstream;

    fn question(name: &str) -> Vec<u8> {
        let mut message = Message::query();
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        message.metadata.recursion_desired = true;
        message.to_vec().unwrap()
    }

    async fn upstream(code: ResponseCode) -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 1500];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                let query = Message::from_vec(&buffer[..length]).unwrap();
                let mut answer = failed(&query, code);
                if code == ResponseCode::NoError {
                    let name = query.queries[0].name.clone();
                    let data = RData::A(A(Ipv4Addr::new(192, 0, 2, 80)));
                    answer.add_answer(Record::from_rdata(name, 60, data));
                }
                // First somebody who guesses.
                let mut forged = answer.clone();
                forged.metadata.id = forged.metadata.id.wrapping_add(1);
                socket.send_to(&forged.to_vec().unwrap(), from).await.unwrap();
                socket.send_to(&answer.to_vec().unwrap(), from).await.unwrap();
            }
        });
        address
    }

    async fn asked(upstreams: Vec<SocketAddr>) -> Message {
        let resolver = Resolver::new(Options::default());
        let resolvers = upstreams.into_iter().map(Upstream::from).collect();
        resolver.set_state(Arc::new(DnsState { resolvers, ..DnsState::default() }));
        let query = question("www.example.org.");
        let answer = resolver.answer(&query, Transport::Udp).await.unwrap();
        assert_eq!(answer[..2], query[..2]);
        Message::from_vec(&answer).unwrap()
    }

    #[tokio::test]
    async fn a_question_is_passed_on_and_the_first_good_answer_wins() {
        let good = upstream(ResponseCode::NoError).await;
        let bad = upstream(ResponseCode::ServFail).await;
        let answer = asked(vec![bad, good]).await;
        assert_eq!(answer.answers.len(), 1);
    }

    #[tokio::test]
    async fn failures_are_told_when_everybody_fails() {
        let bad = upstream(ResponseCode::ServFail).await;
        let refusing = upstream(ResponseCode::Refused).await;
        assert_eq!(asked(vec![refusing, bad]).await.metadata.response_code, ResponseCode::ServFail);
        assert_eq!(asked(vec![refusing]).await.metadata.response_code, ResponseCode::Refused);
        assert_eq!(asked(vec![]).await.metadata.response_code, ResponseCode::ServFail);
    }

    #[tokio::test]
    async fn a_long_answer_is_cut_for_udp_and_whole_for_tcp() {
        let many: Vec<IpAddr> = (0..100).map(|n| IpAddr::from([192, 0, 2, n])).collect();
        let resolver = Resolver::new(Options::default());
        let hosts = HashMap::from([("a.lab".to_owned(), many)]);
        resolver.set_state(Arc::new(DnsState { hosts, has_ipv4: true, ..DnsState::default() }));
        let cut = resolver.answer(&question("a.lab."), Transport::Udp).await.unwrap();
        assert!(cut.len() <= 512 && Message::from_vec(&cut).unwrap().metadata.truncation);
        let whole = resolver.answer(&question("a.lab."), Transport::Tcp).await.unwrap();
        assert_eq!(Message::from_vec(&whole).unwrap().answers.len(), 100);
    }

    #[tokio::test]
    async fn an_answer_that_the_asker_cannot_take_becomes_word_to_ask_by_tcp() {
        let query = Message::from_vec(&question("a.example.")).unwrap();
        let mut long = failed(&query, ResponseCode::NoError);
        for n in 0..100 {
            let name = query.queries[0].name.clone();
            long.add_answer(Record::from_rdata(name, 60, RData::A(A(Ipv4Addr::new(192, 0, 2, n)))));
        }
        let long = long.to_vec().unwrap();
        let cut = Message::from_vec(&fitted(long.clone(), &query, Transport::Udp).unwrap()).unwrap();
        assert!(cut.metadata.truncation && cut.answers.is_empty() && cut.queries == query.queries);
        assert_eq!(fitted(long.clone(), &query, Transport::Tcp).unwrap(), long);
    }

    #[tokio::test]
    async fn a_slow_resolver_without_tcp_is_waited_for() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 1500];
            let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
            tokio::time::sleep(Duration::from_millis(2300)).await;
            let answer = failed(&Message::from_vec(&buffer[..length]).unwrap(), ResponseCode::NXDomain);
            socket.send_to(&answer.to_vec().unwrap(), from).await.unwrap();
        });
        assert_eq!(asked(vec![address]).await.metadata.response_code, ResponseCode::NXDomain);
    }

    /// A resolver of the host that asks us, and counts its questions; `away` is how long it takes for that.
    async fn asking_back(resolver: &Resolver, away: Duration) -> (SocketAddr, Arc<AtomicUsize>) {
        let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let (address, count) = (socket.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
        let (resolver, counter) = (resolver.clone(), Arc::clone(&count));
        tokio::spawn(async move {
            let mut buffer = [0; 1500];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                counter.fetch_add(1, Ordering::Relaxed);
                let mut query = Message::from_vec(&buffer[..length]).unwrap();
                let (socket, resolver) = (Arc::clone(&socket), resolver.clone());
                tokio::spawn(async move {
                    tokio::time::sleep(away).await;
                    let id = std::mem::replace(&mut query.metadata.id, 77);
                    query.metadata.checking_disabled = true;
                    let answer = resolver.answer(&query.to_vec().unwrap(), Transport::Udp).await.unwrap();
                    let mut answer = Message::from_vec(&answer).unwrap();
                    answer.metadata.id = id;
                    socket.send_to(&answer.to_vec().unwrap(), from).await.unwrap();
                });
            }
        });
        (address, count)
    }

    #[tokio::test]
    async fn a_question_that_comes_back_goes_out_once_and_is_named() {
        let resolver = Resolver::new(Options::default());
        let (loops, count) = asking_back(&resolver, Duration::from_millis(20)).await;
        let state = DnsState { resolvers: vec![Upstream::from(loops)], ..DnsState::default() };
        resolver.set_state(Arc::new(state));
        let query = question("www.example.org.");
        let began = Instant::now();
        let answer = resolver.answer(&query, Transport::Udp).await.unwrap();
        assert_eq!(Message::from_vec(&answer).unwrap().metadata.response_code, ResponseCode::ServFail);
        assert!(began.elapsed() < Duration::from_secs(5));
        assert_eq!(count.load(Ordering::Relaxed), 2, "the question and a probe");
        let problems = resolver.problems();
        assert!(problems[0].contains(&loops.to_string()) && problems[0].contains("www.example.org"));
        // Known by now.
        resolver.answer(&query, Transport::Udp).await.unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 2);
        let other = question("ftp.example.org.");
        let ask = || resolver.answer(&other, Transport::Udp);
        tokio::join!(ask(), ask(), ask(), ask());
        assert_eq!(count.load(Ordering::Relaxed), 4, "programs that ask the same at once make no more");
        let good = upstream(ResponseCode::NoError).await;
        let resolvers = vec![Upstream::from(good)];
        resolver.set_state(Arc::new(DnsState { resolvers, ..DnsState::default() }));
        assert!(resolver.problems().is_empty());
        resolver.answer(&query, Transport::Udp).await.unwrap();
    }

    #[tokio::test]
    async fn where_one_of_two_resolvers_leads_back_the_other_answers() {
        let resolver = Resolver::new(Options::default());
        let (loops, count) = asking_back(&resolver, Duration::ZERO).await;
        let good = upstream(ResponseCode::NoError).await;
        let resolvers = vec![Upstream::from(loops), Upstream::from(good)];
        resolver.set_state(Arc::new(DnsState { resolvers, ..DnsState::default() }));
        for _ in 0..3 {
            let answer = resolver.answer(&question("www.example.org."), Transport::Udp).await.unwrap();
            assert_eq!(Message::from_vec(&answer).unwrap().answers.len(), 1);
        }
        assert!(count.load(Ordering::Relaxed) < 10);
    }

    #[tokio::test]
    async fn one_question_of_two_programs_is_no_loop() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 1500];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                tokio::time::sleep(Duration::from_millis(50)).await;
                let answer = failed(&Message::from_vec(&buffer[..length]).unwrap(), ResponseCode::NXDomain);
                socket.send_to(&answer.to_vec().unwrap(), from).await.unwrap();
            }
        });
        let resolver = Resolver::new(Options::default());
        let resolvers = vec![Upstream::from(address)];
        resolver.set_state(Arc::new(DnsState { resolvers, ..DnsState::default() }));
        let query = question("www.example.org.");
        let asks = || async {
            let answer = resolver.answer(&query, Transport::Udp).await.unwrap();
            Message::from_vec(&answer).unwrap().metadata.response_code
        };
        let codes = tokio::join!(asks(), asks(), asks());
        assert_eq!(codes, (ResponseCode::NXDomain, ResponseCode::NXDomain, ResponseCode::NXDomain));
        assert!(resolver.problems().is_empty());
    }

    #[test]
    fn a_message_that_counts_more_than_it_can_have_is_refused_unread() {
        let resolver = Resolver::new(Options::default());
        let mut query = question("a.lab.");
        assert!(counts_fit(&query));
        for section in [4, 6, 8, 10] {
            let mut claims = query.clone();
            claims[section..section + 2].copy_from_slice(&[0xff, 0xff]);
            assert!(!counts_fit(&claims), "{section}");
            let answer = resolver.answer_here(&claims, Transport::Udp).unwrap().unwrap();
            assert_eq!(answer[3] & 0x0f, 1, "FORMERR");
        }
        query.truncate(HEADER - 1);
        assert!(!counts_fit(&query));
    }

    #[test]
    fn a_message_with_many_questions_gets_a_short_refusal() {
        let resolver = Resolver::new(Options::default());
        let mut many = Message::query();
        for number in 0..200 {
            let name = Name::from_ascii(format!("host{number}.lab.")).unwrap();
            many.add_query(Query::query(name, RecordType::A));
        }
        let answer = resolver.answer_here(&many.to_vec().unwrap(), Transport::Udp).unwrap().unwrap();
        assert!(answer.len() <= usize::from(PLAIN_UDP), "{} bytes", answer.len());
        assert_eq!(answer[3] & 0x0f, 1, "FORMERR");
    }

    proptest! {
        #[test]
        fn whatever_comes_it_does_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let resolver = Resolver::new(Options::default());
            let _ = resolver.answer_here(&bytes, Transport::Udp);
        }
    }
}
