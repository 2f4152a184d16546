//! disco datagrams and their inner messages.
#![no_main]

use lacis_wire::disco::{self, Boxes, Message};
use lacis_wire::key::DiscoPrivateKey;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let own = DiscoPrivateKey::from_bytes([1; 32]);
    let peer = DiscoPrivateKey::from_bytes([2; 32]);
    let _ = disco::sender(data);
    let _ = Boxes::new(own.clone()).open(data);
    if let Ok(message) = Message::parse(data) {
        let sealed = Boxes::new(peer.clone()).seal(&own.public(), &message);
        assert_eq!(Boxes::new(own).open(&sealed), Ok((peer.public(), message)));
    }
});
