#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lacis_fuzz::dns::dns_question(data));
