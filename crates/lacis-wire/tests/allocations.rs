//! What decoding allocates: a request of a stranger and a frame of a hostile server are bounded by what is stated, not by
//! what they say. Counted, not timed.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
#![allow(unsafe_code, reason = "a global allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use lacis_wire::control::{MapRequest, MapResponse, RegisterRequest, decode_request};

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

fn count(bytes: isize) {
    // While a thread ends there is nothing to count in.
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}

// SAFETY: everything is handed on to the system's allocator with the caller's own arguments; counting touches only
// thread-local cells without destructors and allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes at most while `work` ran, and bytes that its result keeps.
fn measure<T>(work: impl FnOnce() -> T) -> (usize, usize, T) {
    let before = LIVE.get();
    PEAK.set(before);
    let result = work();
    let (peak, kept) = (PEAK.get() - before, LIVE.get() - before);
    (peak as usize, kept.max(0) as usize, result)
}

/// `item`, as often as fits.
fn filled(before: &str, item: &str, after: &str, size: usize) -> String {
    let count = (size - before.len() - after.len()) / (item.len() + 1);
    let items = vec![item; count].join(",");
    format!("{before}{items}{after}")
}

const MIB: usize = 1 << 20;

/// Bodies of 1 MiB, each the worst for one part of a request.
fn hostile_bodies() -> Vec<String> {
    let in_host = |before: &str, item: &str, after: &str| {
        filled(&format!(r#"{{"Hostinfo":{{{before}"#), item, &format!("{after}}}}}"), MIB)
    };
    vec![
        filled("[", r#"{"":0}"#, "]", MIB),
        filled(r#"{"Unknown":["#, r#"{"":0}"#, "]}", MIB),
        in_host(r#""Unknown":["#, r#"{"":0}"#, "]"),
        in_host(r#""TPM":["#, "[[[[0]]]]", "]"),
        in_host(r#""OSVersion":["#, r#"{"":0}"#, "]"),
        in_host(r#""Services":["#, "{}", "]"),
        in_host(r#""RequestTags":["#, r#""""#, "]"),
        in_host(r#""sshHostKeys":["#, &format!("{:?}", "k".repeat(4096)), "]"),
        in_host(r#""RoutableIPs":["#, r#""::/0""#, "]"),
        in_host(r#""NetInfo":{"DERPLatency":{"#, r#""":0"#, "}}"),
        in_host(r#""Location":["#, "0", "]"),
        in_host(&format!(r#""Hostname":"{}","Services":["#, "x".repeat(MIB / 2)), "{}", "]"),
        filled(r#"{"Endpoints":["#, r#""1.1.1.1:1""#, "]}", MIB),
        filled(r#"{"EndpointTypes":["#, "0", "]}", MIB),
        format!(r#"{{"Followup":"{}"}}"#, "x".repeat(MIB)),
        format!(r#"{{"Auth":{{"AuthKey":"{}"}}}}"#, "x".repeat(MIB)),
        format!(r#"{{"Compress":"{}"}}"#, "\\u0041".repeat(MIB / 6)),
        format!(r#"{{"{}":0}}"#, "\\u0041".repeat(MIB / 6)),
        "[".repeat(MIB),
        "{\"\":".repeat(MIB / 4),
    ]
}

#[test]
fn a_request_costs_no_more_than_its_length_and_keeps_only_what_is_bounded() {
    for body in hostile_bodies() {
        let about = &body[..body.len().min(60)];
        let (peak, kept, _request) = measure(|| decode_request::<MapRequest>(body.as_bytes()));
        assert!(peak <= 3 * MIB, "{peak} bytes for {about}");
        assert!(kept <= 256 << 10, "{kept} bytes kept for {about}");
        let (peak, kept, _request) = measure(|| decode_request::<RegisterRequest>(body.as_bytes()));
        assert!(peak <= 3 * MIB, "{peak} bytes for {about}");
        assert!(kept <= 256 << 10, "{kept} bytes kept for {about}");
    }
}

#[test]
fn a_frame_costs_at_most_so_many_times_its_length() {
    const FRAME: usize = 3 * MIB;
    let frames = [
        filled(r#"{"Peers":["#, "{}", "]}", FRAME),
        filled(r#"{"Peers":["#, "0", "]}", FRAME),
        filled(r#"{"Peers":["#, r#"{"ID":1,"CapMap":{"":[{"":0}]}}"#, "]}", FRAME),
        filled(r#"{"Peers":[{"CapMap":{"":["#, r#"{"":0}"#, "]}}]}", FRAME),
        filled(r#"{"PeersChangedPatch":["#, "{}", "]}", FRAME),
        filled(r#"{"PacketFilter":["#, "{}", "]}", FRAME),
        filled(r#"{"PacketFilter":[{"SrcIPs":["#, r#""""#, "]}]}", FRAME),
        filled(r#"{"PacketFilter":[{"DstPorts":["#, "{}", "]}]}", FRAME),
        filled(r#"{"PacketFilters":{"base":["#, "{}", "]}}", FRAME),
        filled(r#"{"UserProfiles":["#, "{}", "]}", FRAME),
        filled(r#"{"SSHPolicy":["#, r#"{"":0}"#, "]}", FRAME),
        filled(r#"{"Unknown":["#, r#"{"":0}"#, "]}", FRAME),
        filled(r#"{"Health":["#, r#""""#, "]}", FRAME),
        filled(r#"{"OnlineChange":{"#, r#""1":true"#, "}}", FRAME),
    ];
    for frame in frames {
        let (peak, _, decoded) = measure(|| serde_json::from_str::<MapResponse>(&frame));
        let about = &frame[..60];
        assert!(decoded.is_ok(), "{about}");
        assert!(peak <= 320 * MIB, "{peak} bytes for {about}");
    }
}
