//! The JSON inside a login's boxes, by a peer that has the key to seal it.
#![no_main]

use lacis_wire::derp::{ClientInfo, LoginBox, ServerInfo};
use lacis_wire::key::{NodePrivateKey, RelayPrivateKey};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let relay = RelayPrivateKey::from_bytes([1; 32]);
    let node = NodePrivateKey::from_bytes([2; 32]);
    let server = LoginBox::server(&relay, &node.public());
    // as it came: almost never opens
    let _ = ClientInfo::open(&server, data);
    let _ = ServerInfo::open(&server, data);
    // sealed with the right keys
    let client = LoginBox::client(&node, &relay.public());
    let sealed = client.seal_document([3; 24], data);
    if let Ok(info) = ClientInfo::open(&server, &sealed) {
        assert_eq!(ClientInfo::open(&server, &info.seal(&client, [4; 24])), Ok(info));
    }
    if let Ok(info) = ServerInfo::open(&server, &sealed) {
        assert_eq!(ServerInfo::open(&server, &info.seal(&client, [4; 24])), Ok(info));
    }
});
