//! Binding on hosts that lack IPv6.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

/// Opens a socket at `address`. Where the host has no IPv6 at all, `[::]` means all addresses of IPv4, so that the
/// defaults work there too.
pub(crate) fn any_family<T>(
    address: SocketAddr,
    open: impl Fn(SocketAddr) -> io::Result<T>,
) -> io::Result<T> {
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
}
