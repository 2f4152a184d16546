//! Damaged messages through the codecs: `fuzz/mutate.rs` says how many, `fuzz/src/wire.rs` what must hold.

#[path = "../../../fuzz/mutate.rs"]
#[allow(unreachable_pub, missing_debug_implementations)]
mod mutate;
#[path = "../../../fuzz/src/wire.rs"]
#[allow(unreachable_pub)]
mod targets;

use mutate::Target;

/// What JSON is made of, and what it can be made large with.
const JSON: &[&str] = &[
    "null",
    "true",
    "[]",
    "{}",
    "{\"\":0},",
    "[[[[[[[[",
    "]]]]]]]]",
    "\"\\ud800\"",
    "\"\\u0000\"",
    "1e400",
    "-0",
    ",",
    "\"Hostinfo\":{",
    "\"hostinfo\":",
    "\"Peers\":[",
    "\"Node\":{",
    "\"Endpoints\":[\"[::1%x]:1\"],",
    "\"CapMap\":{\"a\":null},",
    "\"Expiry\":\"0001-01-01T00:00:00Z\",",
    "\"KeyExpiry\":\"9999-12-31T23:59:59+23:59\",",
    "\"ShareeNode\":\"x\",",
    "\"Location\":{\"a\":[[0]]},",
    "nodekey:",
    "discokey:",
];

/// Its magic number, and a block of one repeated byte.
const ZSTD: &[&[u8]] = &[b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd\xa4\0\0\0\x08\x03\0\x08x"];

#[test]
fn control_requests_come_back_the_same_and_stay_small() {
    Target::new("control_request").words(JSON).memory(24, 64 << 10).run(targets::control_request);
}

#[test]
fn maps_come_back_the_same_and_stay_small() {
    Target::new("control_response").words(JSON).memory(96, 64 << 10).run(targets::control_response);
}

#[test]
fn map_frames_are_read_however_they_are_cut() {
    // A small zstd block may unpack to a large message: the bound is the codec's own.
    let largest = 2 * lacis_wire::mapframe::MAX_MESSAGE;
    Target::new("mapframe").words(ZSTD).memory(8, largest).run(targets::mapframe);
}

#[test]
fn derp_frames_are_read_however_they_are_cut() {
    // Frames of five bytes, kept in lists by this test.
    Target::new("derp").memory(96, 64 << 10).run(targets::derp);
}

#[test]
fn derp_logins_come_back_the_same() {
    let words = ["version", "\"version\":2,", "CanAckPings", "meshKey", "null", "1e3", "{", "}", "[[[["];
    Target::new("derp_login").words(&words).memory(96, 64 << 10).run(targets::derp_login);
}

#[test]
fn disco_messages_come_back_the_same() {
    Target::new("disco").words(&["TS\u{1f4ac}"]).run(targets::disco);
}

#[test]
fn stun_messages_come_back_the_same() {
    Target::new("stun").run(targets::stun);
}

#[test]
fn damaged_handshakes_are_refused() {
    Target::new("noise_handshake").run(targets::noise_handshake);
}

#[test]
fn records_come_back_the_same_and_noise_does_not_open() {
    Target::new("noise_record").run(targets::noise_record);
}

#[test]
fn keys_come_back_the_same() {
    Target::new("keys")
        .words(&["nodekey:", "mkey:", "discokey:", "privkey:", "0", "f", "F"])
        .run(targets::keys);
}
