//! The JSON that clients send to a coordinator. What decodes is encoded and decoded again to the same.
#![no_main]

use lacis_wire::control::{MapRequest, RegisterRequest, decode_request, to_json};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(request) = decode_request::<MapRequest>(data) {
        let again = decode_request::<MapRequest>(&to_json(&request)).expect("our own JSON");
        assert_eq!(to_json(&again), to_json(&request));
    }
    if let Ok(request) = decode_request::<RegisterRequest>(data) {
        let again = decode_request::<RegisterRequest>(&to_json(&request)).expect("our own JSON");
        assert_eq!(to_json(&again), to_json(&request));
    }
});
