//! Sockets of the daemon's own that stay out of the tunnel it carries: for netcheck and for the router's port mapping.
//!
//! While an exit node is used, or a peer's subnet covers this host's LAN, only packets with the daemon's mark still
//! reach the LAN.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpSocket, UdpSocket};
use tokio_util::task::AbortOnDropHandle;

/// Bytes of an HTTP answer; whoever sends more is not a router or a relay.
const MAX_BODY: usize = 512 << 10;

fn mark(socket: SockRef<'_>, fwmark: Option<u32>) -> io::Result<()> {
    fwmark.map_or(Ok(()), |fwmark| socket.set_mark(fwmark))
}

fn open_udp(local: SocketAddr, fwmark: Option<u32>) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(local), Type::DGRAM, Some(Protocol::UDP))?;
    mark(SockRef::from(&socket), fwmark)?;
    socket.set_nonblocking(true)?;
    socket.bind(&local.into())?;
    Ok(socket)
}

/// A UDP socket at `local`.
pub(crate) fn udp(local: SocketAddr, fwmark: Option<u32>) -> io::Result<UdpSocket> {
    UdpSocket::from_std(open_udp(local, fwmark)?.into())
}

/// Whether this host knows a way to `to`. Sends nothing.
pub(crate) fn has_way(to: SocketAddr, fwmark: Option<u32>) -> bool {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    open_udp(SocketAddr::new(any, 0), fwmark).is_ok_and(|socket| socket.connect(&to.into()).is_ok())
}

/// Whether `ip` is an address of this host.
pub(crate) fn is_own(ip: IpAddr) -> bool {
    open_udp(SocketAddr::new(ip, 0), None).is_ok()
}

/// One HTTP/1.1 exchange in cleartext, on a connection of its own. How long it may take is the caller's business.
pub(crate) async fn http(
    to: SocketAddr,
    fwmark: Option<u32>,
    request: Request<Full<Bytes>>,
) -> io::Result<Response<Bytes>> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    mark(SockRef::from(&socket), fwmark)?;
    let stream = TokioIo::new(socket.connect(to).await?);
    // Old routers know header names only as the standards print them.
    let client = http1::Builder::new().title_case_headers(true).handshake(stream).await;
    let (mut sender, connection) = client.map_err(io::Error::other)?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let (head, body) = sender.send_request(request).await.map_err(io::Error::other)?.into_parts();
    let body = Limited::new(body, MAX_BODY).collect().await.map_err(io::Error::other)?;
    Ok(Response::from_parts(head, body.to_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn own_addresses_are_told_from_others() {
        assert!(is_own(Ipv4Addr::LOCALHOST.into()));
        assert!(!is_own(Ipv4Addr::new(192, 0, 2, 77).into()));
        assert!(has_way(SocketAddr::from((Ipv4Addr::LOCALHOST, 9)), None));
    }
}
