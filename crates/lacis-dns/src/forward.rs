//! Passing a question on: all resolvers that know about it are asked at once, and the first good answer wins (the
//! client dossier, section 8.4).

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// A whole question, everything included.
const TOTAL: Duration = Duration::from_secs(10);
/// Without an answer by UDP after this, TCP is tried too: something on the way may drop the one.
const UDP_PATIENCE: Duration = Duration::from_secs(2);
const TCP_LIMIT: Duration = Duration::from_secs(5);
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

/// Asks all of them, each with the mark that its packets get.
pub(crate) async fn ask(query: &[u8], tcp: bool, upstreams: &[(SocketAddr, Option<u32>)]) -> Forwarded {
    let mut tasks = JoinSet::new();
    for (upstream, fwmark) in upstreams {
        let (query, upstream, fwmark) = (query.to_vec(), *upstream, *fwmark);
        tasks.spawn(async move { one(&query, tcp, upstream, fwmark).await });
    }
    let mut worst = None;
    let race = async {
        while let Some(done) = tasks.join_next().await {
            match done {
                Ok(Ok(answer)) => match code(&answer) {
                    Some(ResponseCode::Refused) => drop(worst.get_or_insert(ResponseCode::Refused)),
                    Some(ResponseCode::ServFail) => worst = Some(ResponseCode::ServFail),
                    Some(_) => return Some(answer),
                    None => {}
                },
                Ok(Err(error)) => tracing::debug!(%error, "no answer from a resolver"),
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

fn code(answer: &[u8]) -> Option<ResponseCode> {
    answer.get(3).map(|flags| ResponseCode::from_low(flags & 0x0f))
}

fn is_truncated(answer: &[u8]) -> bool {
    answer.get(2).is_some_and(|flags| flags & 0x02 != 0)
}

async fn one(query: &[u8], tcp: bool, to: SocketAddr, fwmark: Option<u32>) -> io::Result<Vec<u8>> {
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

fn socket(to: SocketAddr, kind: Type, protocol: Protocol, fwmark: Option<u32>) -> io::Result<Socket> {
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

fn random_id() -> u16 {
    let nonce = lacis_wire::derp::random_nonce();
    u16::from_be_bytes([nonce[0], nonce[1]])
}

fn id_of(message: &[u8]) -> u16 {
    u16::from_be_bytes([message.first().copied().unwrap_or(0), message.get(1).copied().unwrap_or(0)])
}

fn with_id(message: &[u8], id: u16) -> Vec<u8> {
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

/// Asks once more by TCP when a TCP client's question got an answer that was cut.
pub(crate) fn needs_tcp(answer: &Forwarded, tcp: bool) -> bool {
    tcp && matches!(answer, Forwarded::Answer(answer) if is_truncated(answer))
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
