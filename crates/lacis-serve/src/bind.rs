//! Sockets that servers listen on: `[::]` means both families wherever that is
//! possible, and IPv4 alone on hosts that lack IPv6, so that one default serves all hosts.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use socket2::{Domain, Socket, Type};
use tokio::net::TcpListener;

/// Waiting connections: a mass reconnect comes at once.
const BACKLOG: i32 = 4096;

/// Listens on TCP. `all` are the addresses of the same service: where 0.0.0.0 is among them, `[::]` leaves IPv4 to it.
pub fn tcp(address: SocketAddr, all: &[SocketAddr]) -> io::Result<TcpListener> {
    any_family(address, |address| {
        let socket = open(address, all, Type::STREAM)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    })
}

/// Binds a UDP socket, as [`tcp`]; `prepare` is told the family and sets options first.
pub fn udp(
    address: SocketAddr,
    all: &[SocketAddr],
    prepare: impl Fn(&Socket, bool) -> io::Result<()>,
) -> io::Result<Socket> {
    any_family(address, |address| {
        let socket = open(address, all, Type::DGRAM)?;
        prepare(&socket, address.is_ipv6())?;
        socket.bind(&address.into())?;
        Ok(socket)
    })
}

fn open(address: SocketAddr, all: &[SocketAddr], kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    socket.set_nonblocking(true)?;
    if address.is_ipv6() {
        // Said in either case: the host's default may be the other.
        let v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
        socket.set_only_v6(!address.ip().is_unspecified() || all.contains(&v4))?;
    }
    Ok(socket)
}

fn any_family<T>(address: SocketAddr, open: impl Fn(SocketAddr) -> io::Result<T>) -> io::Result<T> {
    match open(address) {
        Err(error)
            if address.is_ipv6()
                && address.ip().is_unspecified()
                && error.raw_os_error() == Some(libc::EAFNOSUPPORT) =>
        {
            let v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
            tracing::info!(%address, %v4, "this host has no IPv6: listening on IPv4 alone");
            open(v4)
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn without_ipv6(address: SocketAddr) -> io::Result<SocketAddr> {
        if address.is_ipv6() { Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT)) } else { Ok(address) }
    }

    #[test]
    fn all_addresses_become_those_of_ipv4_and_a_certain_one_stays_an_error() {
        let bound = any_family("[::]:3478".parse().unwrap(), without_ipv6).unwrap();
        assert_eq!(bound, "0.0.0.0:3478".parse().unwrap());
        assert!(any_family("[::1]:3478".parse().unwrap(), without_ipv6).is_err());
    }

    #[tokio::test]
    async fn both_families_are_served_by_one_socket_or_by_two_side_by_side() {
        let together = tcp("[::]:0".parse().unwrap(), &[]).unwrap();
        let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, together.local_addr().unwrap().port()));
        tokio::net::TcpStream::connect(v4).await.unwrap();

        let one = tcp("0.0.0.0:0".parse().unwrap(), &[]).unwrap();
        let v4 = one.local_addr().unwrap();
        let all = [v4, SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, v4.port()))];
        tcp(all[1], &all).unwrap();

        let one = udp("0.0.0.0:0".parse().unwrap(), &[], |_, _| Ok(())).unwrap();
        let v4 = one.local_addr().unwrap().as_socket().unwrap();
        let all = [v4, SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, v4.port()))];
        udp(all[1], &all, |_, _| Ok(())).unwrap();
    }
}
