//! Damaged answers of routers: `fuzz/mutate.rs` says how many.

use std::net::{Ipv4Addr, SocketAddrV4};

use super::{pcp, upnp};

#[path = "../../../../fuzz/mutate.rs"]
#[allow(missing_debug_implementations, unreachable_pub)]
mod mutate;

const AT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 168, 1, 1), 5000);
const WORDS: &[&str] = &[
    "<!DOCTYPE a [<!ENTITY b \"cc\">]>",
    "&b;",
    "&#0;",
    "<service>",
    "</service>",
    "<URLBase>",
    "http://[::1]:70000/",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "Location: ",
    "ST: ",
    "\r\n",
];

#[test]
fn whatever_a_router_answers_it_is_read_or_not() {
    mutate::Target::new("portmap").words(WORDS).memory(64, 64 << 10).run(|data| {
        if let Some(Ok(granted)) = pcp::pcp_mapped(data, &[7; 12], 41641) {
            assert_eq!(data[24..36], [7; 12], "somebody else's mapping");
            assert_eq!(granted.external.port().to_be_bytes(), data[42..44]);
        }
        let _ = pcp::pmp_address(data);
        let _ = pcp::pmp_mapped(data, 0x0102);
        let Ok(text) = str::from_utf8(data) else { return };
        for address in upnp::addresses(text, AT) {
            assert_eq!(address.ip(), AT.ip(), "another host than the router");
        }
    });
}
