//! The STUN server: tells a client the address its datagram came from.
//!
//! One UDP socket, both families, answering from the address that was asked (a relay may have several). It
//! answers only well-formed requests of mesh clients, with fewer bytes than were asked with (IPv4), so it is of no use to
//! those who look for a reflector.

mod pktinfo;

use std::net::SocketAddr;
use std::sync::Arc;

use lacis_wire::stun::{self, Response};
use prometheus_client::metrics::counter::Counter;
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio_util::sync::CancellationToken;

use lacis_serve::bind;

use crate::Error;
use pktinfo::PacketInfo;

/// Longer datagrams are no requests.
const MAX_REQUEST: usize = 1500;
/// Datagrams answered before other tasks get their turn.
const BATCH: usize = 64;

/// A bound STUN server.
#[derive(Debug)]
pub struct Server {
    socket: UdpSocket,
    metrics: Arc<Metrics>,
}

#[derive(Debug, Default)]
struct Metrics {
    answered: Counter,
    refused: Counter,
    failed: Counter,
}

impl Server {
    /// Binds the socket. `[::]:3478` serves both families, or the one that the host has; `all` as for [`lacis_serve::bind::tcp`].
    pub fn bind(address: SocketAddr, all: &[SocketAddr]) -> Result<Self, Error> {
        let socket = bind::udp(address, all, pktinfo::enable)
            .and_then(|socket| UdpSocket::from_std(socket.into()))
            .map_err(|source| Error::Bind { address, what: "STUN", source })?;
        Ok(Self { socket, metrics: Arc::default() })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Adds the server's counters, named `lacis_stun_…`, to a registry.
    pub fn register_metrics(&self, registry: &mut prometheus_client::registry::Registry) {
        let r = registry.sub_registry_with_prefix("lacis_stun");
        r.register("answered", "Requests answered", self.metrics.answered.clone());
        r.register(
            "refused",
            "Datagrams that were no request of a mesh client",
            self.metrics.refused.clone(),
        );
        r.register("failed", "Answers the system did not take", self.metrics.failed.clone());
    }

    /// Answers until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        let mut buffer = [0; MAX_REQUEST];
        loop {
            let ready = tokio::select! {
                () = stop.cancelled() => return,
                ready = self.socket.readable() => ready,
            };
            if let Err(error) = ready {
                tracing::error!(%error, "the STUN socket failed");
                return;
            }
            for _ in 0..BATCH {
                let received =
                    self.socket.try_io(Interest::READABLE, || pktinfo::receive(&self.socket, &mut buffer));
                match received {
                    Ok((len, from, info)) => self.answer(&buffer[..len], from, &info),
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                    // such as an ICMP error for an earlier answer
                    Err(error) => tracing::debug!(%error, "STUN receive"),
                }
            }
        }
    }

    fn answer(&self, request: &[u8], from: SocketAddr, asked: &PacketInfo) {
        let Ok(id) = stun::parse_request(request) else {
            self.metrics.refused.inc();
            return;
        };
        let response = Response::new(id, from);
        let sent = self
            .socket
            .try_io(Interest::WRITABLE, || pktinfo::send(&self.socket, response.as_bytes(), from, asked));
        match sent {
            Ok(()) => {
                self.metrics.answered.inc();
            }
            Err(error) => {
                self.metrics.failed.inc();
                tracing::debug!(%from, %error, "STUN answer not sent");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;
    use std::time::Duration;

    async fn ask(server: SocketAddr, from: &str, bytes: &[u8]) -> Option<(Vec<u8>, SocketAddr, SocketAddr)> {
        let socket = UdpSocket::bind(from).await.unwrap();
        socket.send_to(bytes, server).await.unwrap();
        let mut buffer = [0; 100];
        let answer =
            tokio::time::timeout(Duration::from_secs(5), socket.recv_from(&mut buffer)).await.ok()?;
        let (len, source) = answer.unwrap();
        Some((buffer[..len].to_vec(), source, socket.local_addr().unwrap()))
    }

    struct Running(
        SocketAddr,
        CancellationToken,
        tokio::task::JoinHandle<()>,
        prometheus_client::registry::Registry,
    );

    fn start(address: &str) -> Running {
        let server = Server::bind(address.parse().unwrap(), &[]).unwrap();
        let mut registry = prometheus_client::registry::Registry::default();
        server.register_metrics(&mut registry);
        let at = server.local_addr().unwrap();
        let stop = CancellationToken::new();
        Running(at, stop.clone(), tokio::spawn(server.run(stop)), registry)
    }

    #[tokio::test]
    async fn both_families_are_told_their_address_from_the_address_they_asked() {
        let running = start("[::]:0");
        for (server, from, len) in
            [("127.0.0.1", "127.0.0.1:0", 32), ("127.0.0.2", "127.0.0.1:0", 32), ("::1", "[::1]:0", 44)]
        {
            let server = SocketAddr::new(server.parse::<IpAddr>().unwrap(), running.0.port());
            let id = stun::TxId::random();
            let (answer, source, own) = ask(server, from, &stun::request(id)).await.unwrap();
            assert_eq!(answer.len(), len);
            assert_eq!(source, server, "answers come from the address that was asked");
            assert_eq!(stun::parse_response(&answer), Ok((id, own)));
        }
        running.1.cancel();
        running.2.await.unwrap();
    }

    #[tokio::test]
    async fn strangers_get_no_answer() {
        let running = start("127.0.0.1:0");
        let mut foreign = stun::request(stun::TxId::random());
        foreign[39] ^= 1;
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.send_to(&foreign, running.0).await.unwrap();
        socket.send_to(b"hello", running.0).await.unwrap();
        // the server takes datagrams in order: an answer to the third shows that the first two had none
        let id = stun::TxId::random();
        socket.send_to(&stun::request(id), running.0).await.unwrap();
        let mut buffer = [0; 100];
        let (len, _) = socket.recv_from(&mut buffer).await.unwrap();
        assert_eq!(stun::parse_response(&buffer[..len]).unwrap().0, id);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &running.3).unwrap();
        assert!(
            text.contains("lacis_stun_refused_total 2") && text.contains("lacis_stun_answered_total 1"),
            "{text}"
        );
        running.1.cancel();
        running.2.await.unwrap();
    }
}
