//! STUN datagrams, as a server and as a client read them.
#![no_main]

use lacis_wire::stun;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = stun::parse_request(data);
    if let Ok((id, address)) = stun::parse_response(data) {
        let response = stun::Response::new(id, address);
        assert_eq!(stun::parse_response(response.as_bytes()), Ok((id, address)));
    }
});
