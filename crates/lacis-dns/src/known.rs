//! Addresses of well-known resolvers by the host of their URL, so that they can be asked while no other resolver can.
//! Which ones and where: as Tailscale's clients know them (`net/dns/publicdns`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Host, and the addresses of its service.
const HOSTS: &[(&str, &[&str])] = &[
    ("cloudflare-dns.com", &["1.1.1.1", "1.0.0.1", "2606:4700:4700::1111", "2606:4700:4700::1001"]),
    ("one.one.one.one", &["1.1.1.1", "1.0.0.1", "2606:4700:4700::1111", "2606:4700:4700::1001"]),
    ("security.cloudflare-dns.com", &["1.1.1.2", "1.0.0.2", "2606:4700:4700::1112", "2606:4700:4700::1002"]),
    ("family.cloudflare-dns.com", &["1.1.1.3", "1.0.0.3", "2606:4700:4700::1113", "2606:4700:4700::1003"]),
    ("dns.google", &["8.8.8.8", "8.8.4.4", "2001:4860:4860::8888", "2001:4860:4860::8844"]),
    ("dns.quad9.net", &["9.9.9.9", "149.112.112.112", "2620:fe::fe", "2620:fe::9"]),
    ("dns10.quad9.net", &["9.9.9.10", "149.112.112.10", "2620:fe::10", "2620:fe::fe:10"]),
    ("dns11.quad9.net", &["9.9.9.11", "149.112.112.11", "2620:fe::11", "2620:fe::fe:11"]),
    ("dns.mullvad.net", &["194.242.2.2", "2a07:e340::2"]),
    ("adblock.dns.mullvad.net", &["194.242.2.3", "2a07:e340::3"]),
    ("base.dns.mullvad.net", &["194.242.2.4", "2a07:e340::4"]),
    ("extended.dns.mullvad.net", &["194.242.2.5", "2a07:e340::5"]),
    ("family.dns.mullvad.net", &["194.242.2.6", "2a07:e340::6"]),
    ("all.dns.mullvad.net", &["194.242.2.9", "2a07:e340::9"]),
    ("wikimedia-dns.org", &["185.71.138.138", "2001:67c:930::1"]),
    // Which customer asks is in the path.
    ("dns.nextdns.io", &["45.90.28.0", "45.90.30.0", "2a07:a8c0::", "2a07:a8c1::"]),
    ("dns.controld.com", &["76.76.2.22", "76.76.10.22"]),
];

/// Control D's public profiles: the path, and the last part of their addresses, which is written alike in both families.
const CONTROL_D: &str = "freedns.controld.com";
const CONTROL_D_PROFILES: &[(&str, u8)] = &[
    ("/p0", 0),
    ("/p1", 1),
    ("/p2", 2),
    ("/p3", 3),
    ("/family", 4),
    ("/x-oisd", 32),
    ("/x-oisd-basic", 33),
    ("/x-stevenblack", 35),
    ("/x-hagezi-light", 37),
    ("/x-1hosts-lite", 38),
    ("/x-1hosts-pro", 39),
    ("/x-hagezi-normal", 40),
    ("/x-hagezi-pro", 41),
    ("/x-hagezi-proplus", 42),
    ("/x-goodbyeads", 43),
    ("/x-adguard", 44),
    ("/x-hagezi-ultimate", 45),
    ("/x-hagezi-tif", 46),
    ("/x-hblock", 47),
    ("/x-1hosts-xtra", 48),
];

/// The addresses of a host that is known, asked with this path; none for others.
pub(crate) fn addresses(host: &str, path: &str) -> Vec<IpAddr> {
    if host == CONTROL_D {
        let profile = CONTROL_D_PROFILES.iter().find(|(known, _)| *known == path);
        return profile.map(|(_, last)| control_d(*last)).unwrap_or_default();
    }
    let known = HOSTS.iter().find(|(known, _)| *known == host).map_or([].as_slice(), |(_, texts)| texts);
    known.iter().filter_map(|text| text.parse().ok()).collect()
}

fn control_d(last: u8) -> Vec<IpAddr> {
    // 76.76.2.32 and 2606:1a40::32: the digits are the same, not the number.
    let digits = u16::from(last / 10 * 16 + last % 10);
    let v4 = [2, 10].map(|net| Ipv4Addr::new(76, 76, net, last).into());
    let v6 = [0, 1].map(|net| Ipv6Addr::new(0x2606, 0x1a40, net, 0, 0, 0, 0, digits).into());
    v4.into_iter().chain(v6).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_hosts_have_addresses_and_others_none() {
        for (host, texts) in HOSTS {
            assert_eq!(addresses(host, "/dns-query").len(), texts.len(), "{host}");
        }
        let family: Vec<IpAddr> = ["76.76.2.44", "76.76.10.44", "2606:1a40::44", "2606:1a40:1::44"]
            .map(|ip| ip.parse().unwrap())
            .into();
        assert_eq!(addresses(CONTROL_D, "/x-adguard"), family);
        assert_eq!(addresses(CONTROL_D, "/unknown"), Vec::<IpAddr>::new());
        assert_eq!(addresses("dns.example.org", "/dns-query"), Vec::<IpAddr>::new());
    }
}
