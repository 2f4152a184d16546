//! A DERP byte stream, cut anywhere, as each side reads it. Frames that decode encode to frames that decode alike.
#![no_main]

use bytes::BytesMut;
use lacis_wire::derp::{Decoder, Frame, Role};
use libfuzzer_sys::fuzz_target;

fn decode(role: Role, data: &[u8], chunk: usize) -> Vec<Frame> {
    let (mut decoder, mut buf, mut frames) = (Decoder::new(role), BytesMut::new(), Vec::new());
    for piece in data.chunks(chunk) {
        buf.extend_from_slice(piece);
        loop {
            match decoder.decode(&mut buf) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(_) => return frames,
            }
        }
    }
    frames
}

fuzz_target!(|data: &[u8]| {
    let Some((&cut, stream)) = data.split_first() else { return };
    for role in [Role::ServerLogin, Role::Server, Role::Client] {
        let frames = decode(role, stream, usize::from(cut) + 1);
        assert_eq!(frames, decode(role, stream, usize::MAX), "how the stream is cut does not matter");
        for frame in frames {
            if !matches!(frame, Frame::Unknown { .. }) {
                assert_eq!(decode(Role::Client, &frame.to_bytes(), usize::MAX), [frame]);
            }
        }
    }
});
