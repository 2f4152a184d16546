//! Damaged packets: `fuzz/mutate.rs` says how many, `fuzz/src/tunnel.rs` what must hold; and the filter agrees with the
//! slow one of its unit tests.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "../../../fuzz/mutate.rs"]
#[allow(unreachable_pub, missing_debug_implementations)]
mod mutate;
#[path = "../src/filter/reference/slow.rs"]
mod slow;
#[path = "../../../fuzz/src/tunnel.rs"]
#[allow(unreachable_pub)]
mod targets;

use lacis_tunnel::Verdict;
use mutate::Target;
use slow::{Slow, Slowly, see};

#[test]
fn the_filter_judges_packets_as_the_slow_one_does() {
    let (rules, local) = (targets::rules(), targets::local());
    // Tables of flows have a fixed size.
    Target::new("filter").memory(64, 1 << 20).run(|data| {
        let closed = targets::packets(data).0;
        let mut slow = Slow::new(rules.clone(), local.clone(), Vec::new(), closed);
        targets::filter(data, |packet, out, verdict| {
            if out {
                return slow.outbound(packet);
            }
            assert_eq!(
                verdict.is_some(),
                see(packet).is_some(),
                "one of them does not read it: {packet:02x?}"
            );
            match slow.inbound(packet) {
                Slowly::Either => {}
                slowly => assert_eq!(
                    verdict == Some(Verdict::Accept),
                    slowly == Slowly::Accept,
                    "{verdict:?} and {slowly:?} for {packet:02x?}"
                ),
            }
        });
    });
}

#[test]
fn control_messages_in_the_tunnel_come_back_the_same() {
    Target::new("tsmp").words(&["!", "p12345678", "o12345678", "a"]).run(targets::tsmp);
}
