//! Keys in text form.
#![no_main]

use lacis_wire::key::{DiscoKey, MachineKey, NodeKey, NodePrivateKey, RelayKey};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    fn there_and_back<K: std::str::FromStr + ToString + PartialEq + std::fmt::Debug>(text: &str)
    where
        K::Err: std::fmt::Debug,
    {
        if let Ok(key) = text.parse::<K>() {
            assert_eq!(key.to_string().parse::<K>().expect("our own text"), key);
        }
    }
    there_and_back::<NodeKey>(text);
    there_and_back::<MachineKey>(text);
    there_and_back::<DiscoKey>(text);
    there_and_back::<RelayKey>(text);
    let _ = text.parse::<NodePrivateKey>();
});
