//! Damaged questions, answers and packets: `fuzz/mutate.rs` says how many, `fuzz/src/dns.rs` what must hold.

#[path = "../../../fuzz/mutate.rs"]
#[allow(unreachable_pub, missing_debug_implementations)]
mod mutate;
#[path = "../../../fuzz/src/dns.rs"]
#[allow(unreachable_pub)]
mod targets;

use mutate::Target;

/// Names, a pointer, types, EDNS.
const WORDS: &[&[u8]] = &[
    b"\x03bob\x03lab\x07example\0",
    b"\x01a\x01b\x07_dns-sd\x04_udp\0",
    b"\x012\x010\x0264\x03100\x07in-addr\x04arpa\0",
    b"\xc0\x0c",
    b"\0\x01\0\x01",
    b"\0\0\x29\x04\xd0\0\0\0\0\0\0",
];

#[test]
fn questions_are_answered_or_not_and_answers_fit() {
    Target::new("dns_question").words(WORDS).memory(256, 256 << 10).run(targets::dns_question);
}

#[test]
fn only_the_answer_to_a_question_counts() {
    Target::new("dns_answer").words(WORDS).run(targets::dns_answer);
}

#[test]
fn packets_to_the_resolver_stay_within_its_sockets() {
    // The sockets with their buffers, which are there before any packet.
    Target::new("dns_packets").words(WORDS).memory(64, 1 << 20).run(targets::dns_packets);
}
