//! A map stream, plain and zstd, cut anywhere; and whatever was framed comes back.
#![no_main]

use lacis_wire::mapframe::{Compression, Decoder, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&cut, stream)) = data.split_first() else { return };
    for compression in [Compression::Plain, Compression::Zstd] {
        let mut decoder = Decoder::new(compression);
        'stream: for piece in stream.chunks(usize::from(cut) + 1) {
            decoder.push(piece);
            loop {
                match decoder.next_message() {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(_) => break 'stream,
                }
            }
        }
        let framed = encode(stream, compression).expect("short messages can be framed");
        let mut decoder = Decoder::new(compression);
        decoder.push(&framed);
        assert_eq!(decoder.next_message().expect("our own frame"), Some(stream.to_vec().into()));
    }
});
