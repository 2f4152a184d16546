//! The JSON that a coordinator sends to clients.
#![no_main]

use lacis_wire::control::{MapResponse, RegisterResponse, decode_request, to_json};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(response) = decode_request::<MapResponse>(data) {
        let again = decode_request::<MapResponse>(&to_json(&response)).expect("our own JSON");
        assert_eq!(to_json(&again), to_json(&response));
    }
    if let Ok(response) = decode_request::<RegisterResponse>(data) {
        let again = decode_request::<RegisterResponse>(&to_json(&response)).expect("our own JSON");
        assert_eq!(to_json(&again), to_json(&response));
    }
});
