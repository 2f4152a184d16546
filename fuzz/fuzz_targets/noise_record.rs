//! Records of an established session: whatever was sealed opens again, noise does not.
#![no_main]

use lacis_wire::noise::{Opener, Sealer};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (mut sealer, mut opener) = (Sealer::new(&[7; 32]), Opener::new(&[7; 32]));
    let mut wire = Vec::new();
    sealer.seal(data, &mut wire).expect("a fresh sealer seals");
    let (mut rest, mut opened) = (&mut wire[..], Vec::new());
    while let Some(len) = Opener::frame_len(rest).expect("our own frames are good") {
        let (frame, behind) = rest.split_at_mut(len);
        let range = opener.open(frame).expect("our own frames open");
        opened.extend_from_slice(&frame[range]);
        rest = behind;
    }
    assert_eq!(opened, data);

    let mut stranger = Opener::new(&[8; 32]);
    if let Ok(Some(len)) = Opener::frame_len(data)
        && len <= data.len()
    {
        let _ = stranger.open(&mut data[..len].to_vec());
    }
});
