//! What strangers send as the first and second message of the control protocol's handshake.
#![no_main]

use lacis_wire::key::MachinePrivateKey;
use lacis_wire::noise::{Initiator, Responder};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let server = MachinePrivateKey::from_bytes([1; 32]);
    if let Ok(responder) = Responder::read(&server, data) {
        let _ = responder.respond();
    }
    let client = MachinePrivateKey::from_bytes([2; 32]);
    let (initiator, initiation) =
        Initiator::new(&client, &server.public(), 113).expect("our own keys are good");
    let _ = initiator.finish(data);
    // the genuine first message, damaged
    let mut damaged = initiation;
    for (byte, noise) in damaged.iter_mut().zip(data) {
        *byte ^= noise;
    }
    let _ = Responder::read(&server, &damaged);
});
