//! Fuzzing where there is no nightly compiler: the seeds of a target (`seeds/TARGET/`), changed at random from a fixed
//! start, go through the target's function; what one input makes it allocate is bounded too.
//!
//! The `tests/mutations.rs` of several crates include this file and the targets in `src/`. `MUTATIONS` says how many
//! inputs each target gets, `MUTATIONS_START` another start.
#![allow(unsafe_code)] // an allocator that counts

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

/// Inputs of a target, where `MUTATIONS` does not say.
const INPUTS: u64 = 1000;
/// No input is longer: what grows with the length shows long before.
const MAX_LEN: usize = 32 << 10;
/// Changes that one input gets at most.
const MAX_CHANGES: usize = 6;
/// What one input may make a target allocate at once, however short it is.
const BASE_MEMORY: usize = 64 << 10;
/// Bytes that parsers treat in their own way.
const BYTES: [u8; 14] = [0, 1, 2, 0x7f, 0x80, 0xff, b'"', b'\\', b'{', b'[', b']', b',', b'-', b'\n'];
const NUMBERS: [&str; 9] =
    ["0", "-1", "255", "65536", "4294967296", "9223372036854775808", "1e309", "0.5", "00"];

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator, which counts what each thread holds.
#[derive(Debug)]
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(bytes: isize) {
    // A thread that is ending has no counters any more.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call goes on to the system's allocator as it came; counting touches no memory of the caller.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps to GlobalAlloc's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.realloc(memory, layout, size) }
    }
}

/// A target and how it is fed.
pub struct Target<'a> {
    name: &'a str,
    words: Vec<&'a [u8]>,
    factor: usize,
    base: usize,
}

impl<'a> Target<'a> {
    /// By the name of its folder of seeds. May allocate 8 bytes for each byte of input, and a little.
    pub fn new(name: &'a str) -> Self {
        Self { name, words: Vec::new(), factor: 8, base: BASE_MEMORY }
    }

    /// Words of the format, which chance does not find.
    #[must_use]
    pub fn words<W: AsRef<[u8]> + ?Sized>(self, words: &'a [&'a W]) -> Self {
        Self { words: words.iter().map(|word| (*word).as_ref()).collect(), ..self }
    }

    /// May allocate `factor` bytes for each byte of input, and `base` whatever it is.
    #[must_use]
    pub fn memory(self, factor: usize, base: usize) -> Self {
        Self { factor, base, ..self }
    }

    fn seeds(&self) -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(self.name);
        let listed =
            std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let mut files: Vec<_> =
            listed.map(|entry| entry.expect("a folder that can be read").path()).collect();
        files.sort();
        assert!(!files.is_empty(), "{} has no seeds", folder.display());
        files.iter().map(|file| std::fs::read(file).expect("a file that can be read")).collect()
    }

    /// Feeds the seeds, and then as many changed ones as are wanted.
    pub fn run(&self, feed: impl Fn(&[u8])) {
        let number = |name| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
        let seeds = self.seeds();
        let hash = |sum: u64, byte: u8| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        let start = self.name.bytes().fold(number("MUTATIONS_START").unwrap_or(0xcbf2_9ce4_8422_2325), hash);
        let mut mutator =
            Mutator { random: fastrand::Rng::with_seed(start), seeds: &seeds, words: &self.words };
        // What is made once, at the first call, is not the input's.
        let _ = catch_unwind(AssertUnwindSafe(|| feed(&seeds[0])));
        for seed in &seeds {
            self.feed(seed, &feed);
        }
        let inputs = number("MUTATIONS").unwrap_or(INPUTS);
        let began = std::time::Instant::now();
        for _ in 0..inputs {
            self.feed(&mutator.next(), &feed);
        }
        if inputs > INPUTS {
            eprintln!(
                "{}: {inputs} inputs in {} s, none of them wrong",
                self.name,
                began.elapsed().as_secs()
            );
        }
    }

    fn feed(&self, input: &[u8], feed: &impl Fn(&[u8])) {
        let held = HELD.get();
        PEAK.set(held);
        let fed = catch_unwind(AssertUnwindSafe(|| feed(input)));
        let used = usize::try_from(PEAK.get() - held).unwrap_or(0);
        if let Err(panic) = fed {
            eprintln!("{}: this input fails: {}", self.name, shown(input));
            resume_unwind(panic);
        }
        let limit = self.factor * input.len() + self.base;
        assert!(used <= limit, "{}: {used} bytes for {} of input: {}", self.name, input.len(), shown(input));
    }
}

/// An input as a byte string of Rust.
fn shown(input: &[u8]) -> String {
    let mut text = format!("b\"{}", input[..input.len().min(2000)].escape_ascii());
    let _ =
        if input.len() > 2000 { write!(text, "\"… ({} bytes)", input.len()) } else { write!(text, "\"") };
    text
}

struct Mutator<'a> {
    random: fastrand::Rng,
    seeds: &'a [Vec<u8>],
    words: &'a [&'a [u8]],
}

impl Mutator<'_> {
    fn next(&mut self) -> Vec<u8> {
        let mut input = self.seed().to_vec();
        for _ in 0..=self.random.usize(..MAX_CHANGES) {
            self.change(&mut input);
            // Most inputs change little: they come far into a parser.
            if self.random.bool() {
                break;
            }
        }
        input.truncate(MAX_LEN);
        input
    }

    fn seed(&mut self) -> &[u8] {
        &self.seeds[self.random.usize(..self.seeds.len())]
    }

    /// A place in the input, its end included.
    fn place(&mut self, input: &[u8]) -> usize {
        self.random.usize(..=input.len())
    }

    /// Two places in the input, in order, rarely far from each other.
    fn range(&mut self, input: &[u8]) -> std::ops::Range<usize> {
        let start = self.place(input);
        let longest = if self.random.u8(..8) == 0 { input.len() } else { 16 };
        start..(start + self.random.usize(..=longest)).min(input.len())
    }

    fn insert(&mut self, input: &mut Vec<u8>, bytes: &[u8]) {
        let at = self.place(input);
        input.splice(at..at, bytes.iter().copied());
    }

    fn change(&mut self, input: &mut Vec<u8>) {
        let at = self.random.usize(..input.len().max(1));
        match self.random.u8(..12) {
            0 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte ^= 1 << self.random.u8(..8);
                }
            }
            1 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte = self.random.choice(BYTES).unwrap_or(0);
                }
            }
            2 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte = byte.wrapping_add(self.random.u8(..)).wrapping_sub(self.random.u8(..32));
                }
            }
            3 => input.truncate(at),
            4 => {
                let range = self.range(input);
                input.drain(range);
            }
            5 => {
                let copied = input[self.range(input)].to_vec();
                // Now and then so often that what is nested, counted or doubled shows.
                let times = if self.random.u8(..16) == 0 { self.random.usize(1..300) } else { 1 };
                let room = MAX_LEN.saturating_sub(input.len()) / copied.len().max(1);
                let copies = copied.repeat(times.min(room));
                self.insert(input, &copies);
            }
            6 => {
                let bytes: Vec<u8> = (0..self.random.usize(1..9)).map(|_| self.random.u8(..)).collect();
                self.insert(input, &bytes);
            }
            7 => {
                if let Some(word) = self.random.choice(self.words) {
                    self.insert(input, word);
                }
            }
            8 => {
                let other = self.seed().to_vec();
                let (end, start) = (self.place(input), self.place(&other));
                input.truncate(end);
                input.extend_from_slice(&other[start..]);
            }
            9 => self.length_field(input),
            10 => self.number(input),
            _ => {
                let moved: Vec<u8> = input.drain(self.range(input)).collect();
                self.insert(input, &moved);
            }
        }
    }

    /// Two, four or eight bytes become a length that is just right, just wrong, or huge.
    fn length_field(&mut self, input: &mut [u8]) {
        let size = 1 << self.random.usize(1..4);
        if input.len() < size {
            return;
        }
        let at = self.random.usize(..=input.len() - size);
        let behind = (input.len() - at - size) as u64;
        let value = match self.random.u8(..7) {
            0 => behind,
            1 => behind + 1,
            2 => behind.wrapping_sub(1),
            3 => u64::MAX,
            4 => u64::MAX >> 1,
            5 => 1 << self.random.u8(..64),
            _ => self.random.u64(..),
        };
        let (little, big) = (value.to_le_bytes(), value.to_be_bytes());
        input[at..at + size].copy_from_slice(if self.random.bool() {
            &little[..size]
        } else {
            &big[8 - size..]
        });
    }

    /// Digits become another number.
    fn number(&mut self, input: &mut Vec<u8>) {
        let from = self.place(input);
        let Some(start) = input[from..].iter().position(u8::is_ascii_digit).map(|at| from + at) else {
            return;
        };
        let end = input[start..]
            .iter()
            .position(|byte| !byte.is_ascii_digit())
            .map_or(input.len(), |at| start + at);
        let number = self.random.choice(NUMBERS).unwrap_or("0");
        input.splice(start..end, number.bytes());
    }
}
