//! 4via6 addresses: an IPv4 address of one of many sites whose networks overlap, written as IPv6. The first 64 bits are
//! always the same, the next 32 number the site, the last 32 are the address; a route is such an address with a prefix
//! length of 96 and more. The form is Tailscale's (`net/tsaddr`, `TailscaleViaRange` and `MapVia`).

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};

/// All 4via6 addresses.
pub const RANGE: Ipv6Net =
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0xb1a, 0, 0, 0, 0), RANGE_BITS);
/// The highest number of a site; higher ones are reserved.
pub const MAX_SITE: u32 = 0xffff;
const RANGE_BITS: u8 = 64;
/// Of a route to a whole site.
const SITE_BITS: u8 = 96;

/// An IPv4 network of a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Via {
    /// At most [`MAX_SITE`].
    pub site: u32,
    /// The network there.
    pub net: Ipv4Net,
}

/// Why something is no 4via6 route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ViaError {
    /// It is another kind of network.
    #[error("{0} is not in {RANGE}, where 4via6 routes are")]
    Outside(Ipv6Net),
    /// It does not say which site.
    #[error("the 4via6 route {0} is for more than one site: its prefix is at least /{SITE_BITS}")]
    TooWide(Ipv6Net),
    /// A site that cannot be.
    #[error("the site {0} is too high a number: sites are 0 to {MAX_SITE}")]
    BadSite(u32),
}

impl Via {
    /// The network of a site.
    ///
    /// # Errors
    /// For numbers above [`MAX_SITE`].
    pub fn new(site: u32, net: Ipv4Net) -> Result<Self, ViaError> {
        if site > MAX_SITE { Err(ViaError::BadSite(site)) } else { Ok(Self { site, net: net.trunc() }) }
    }

    /// The route as it is advertised.
    pub fn to_ipv6(self) -> Ipv6Net {
        let bits = SITE_BITS + self.net.prefix_len();
        // At most 96 + 32.
        Ipv6Net::new_assert(address(self.site, self.net.addr()), bits)
    }
}

impl TryFrom<Ipv6Net> for Via {
    type Error = ViaError;

    fn try_from(net: Ipv6Net) -> Result<Self, ViaError> {
        let (site, ip) = split(net.addr()).ok_or(ViaError::Outside(net))?;
        let bits = net.prefix_len().checked_sub(SITE_BITS).ok_or(ViaError::TooWide(net))?;
        Self::new(site, Ipv4Net::new_assert(ip, bits))
    }
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "site {} ({:#x}), {}", self.site, self.site, self.net)
    }
}

/// The IPv6 address for an IPv4 address of a site.
pub fn address(site: u32, ip: Ipv4Addr) -> Ipv6Addr {
    let low = u128::from(site) << 32 | u128::from(u32::from(ip));
    Ipv6Addr::from(u128::from(RANGE.addr()) | low)
}

/// Site and IPv4 address of a 4via6 address; `None` for any other.
pub fn split(ip: Ipv6Addr) -> Option<(u32, Ipv4Addr)> {
    let bits = u128::from(ip);
    RANGE.contains(&ip).then(|| ((bits >> 32) as u32, Ipv4Addr::from(bits as u32)))
}

/// The number of a site as people write it: decimal, or hexadecimal with `0x`.
pub fn parse_site(text: &str) -> Option<u32> {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let site = match text.strip_prefix("0x") {
        Some(hex) if digits(hex) => u32::from_str_radix(hex, 16).ok()?,
        None if digits(text) => text.parse().ok()?,
        _ => return None,
    };
    (site <= MAX_SITE).then_some(site)
}

/// The address that a label of a name stands for, such as `10-1-1-1-via-7`.
pub fn parse_label(label: &str) -> Option<Ipv6Addr> {
    let (ip, site) = label.rsplit_once("-via-")?;
    // No dots: they would be taken as they are.
    let ip = (!ip.contains('.')).then(|| Ipv4Addr::from_str(&ip.replace('-', ".")).ok())??;
    Some(address(parse_site(site)?, ip))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> Ipv6Net {
        text.parse().unwrap()
    }

    #[test]
    fn a_route_is_written_as_tailscale_writes_it() {
        // From Tailscale's documentation of 4via6 subnet routers.
        let via = Via::new(7, "10.1.1.0/24".parse().unwrap()).unwrap();
        assert_eq!(via.to_ipv6(), net("fd7a:115c:a1e0:b1a:0:7:a01:100/120"));
        assert_eq!(via.to_string(), "site 7 (0x7), 10.1.1.0/24");
        assert_eq!(
            Via::new(9, "172.16.0.0/12".parse().unwrap()).unwrap().to_ipv6(),
            net("fd7a:115c:a1e0:b1a:0:9:ac10:0/108")
        );
    }

    #[test]
    fn what_is_no_route_to_one_site_says_why() {
        let of = |text: &str| Via::try_from(net(text)).unwrap_err().to_string();
        assert!(of("fd7a:115c:a1e0::/48").contains("is not in fd7a:115c:a1e0:b1a::/64"));
        assert!(of("fd7a:115c:a1e0:b1a::/64").contains("more than one site"));
        assert!(of("fd7a:115c:a1e0:b1a:0:7::/95").contains("more than one site"));
        assert!(of("fd7a:115c:a1e0:b1a:1:7::/96").contains("65543 is too high"));
        assert_eq!(Via::try_from(net("fd7a:115c:a1e0:b1a:0:7::/96")).unwrap().net.to_string(), "0.0.0.0/0");
    }

    #[test]
    fn a_label_is_an_address_and_others_are_not() {
        assert_eq!(parse_label("10-1-1-1-via-7"), Some("fd7a:115c:a1e0:b1a:0:7:a01:101".parse().unwrap()));
        assert_eq!(
            parse_label("10-1-1-1-via-0xff"),
            Some("fd7a:115c:a1e0:b1a:0:ff:a01:101".parse().unwrap())
        );
        for label in [
            "",
            "-via-",
            "-via-7",
            "10-1-1-1-via-",
            "10-1-1-via-7",
            "10-1-1-1-1-via-7",
            "10-1-1-256-via-7",
            "10.1.1.1-via-7",
            "10-1-1-1-via-65536",
            "10-1-1-1-via-+7",
            "10-1-1-1-via-ff",
            "10-1-1-1-via-0x",
            "10-1-1-1via-7",
            "10--1-1-via-7",
            "x-10-1-1-1-via-7",
        ] {
            assert_eq!(parse_label(label), None, "{label}");
        }
    }

    proptest! {
        #[test]
        fn addresses_and_routes_survive_the_way_there_and_back(site in 0..=MAX_SITE, ip: u32, bits in 0..=32_u8) {
            let ip = Ipv4Addr::from(ip);
            prop_assert_eq!(split(address(site, ip)), Some((site, ip)));
            let via = Via::new(site, Ipv4Net::new(ip, bits).unwrap()).unwrap();
            prop_assert_eq!(Via::try_from(via.to_ipv6()), Ok(via));
            prop_assert_eq!(parse_label(&format!("{}-via-{site}", ip.to_string().replace('.', "-"))), Some(address(site, ip)));
        }
    }
}
