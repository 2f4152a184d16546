//! Questions that come back: a resolver that we ask and that asks us, such as the host's own (127.0.0.53, a dnsmasq) when
//! it is set to 100.100.100.100.
//!
//! A question that arrives while the same one waits for an answer may be our own, or another program's. What tells them
//! apart is a probe, as dnsmasq's `--dns-loop-detect` sends them: a random label below the name, which takes the same way
//! as the question and which nobody else can ask for. A resolver whose probe arrives here is not asked for that name for a
//! while. No sockets here; time comes in as an argument.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::state::Upstream;

/// The first label of a probe begins so.
const PREFIX: &str = "lacis-loop-";
/// A name without its dot at the end (RFC 1035, section 2.3.4).
const MAX_NAME: usize = 253;
/// A probe that has not come back by then will not.
const PROBE_LIFE: Duration = Duration::from_secs(10);
/// For so long the verdict of a probe stands.
const VERDICT: Duration = Duration::from_secs(30);
/// For so long a loop is named after it was seen.
const REPORTED: Duration = Duration::from_mins(5);
/// Entries of each table; the oldest give way.
const MAX_ENTRIES: usize = 1024;

/// A question in short: the name in lower case, and the type.
pub(crate) type Key = (String, u16);

/// A question that waits for its resolvers.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    pub(crate) upstreams: Vec<Upstream>,
    /// Becomes cancelled when it waits no more.
    pub(crate) done: CancellationToken,
    /// Its resolvers are being probed, and when they have been.
    probing: AtomicBool,
    pub(crate) probed: CancellationToken,
}

/// Whether a question comes back.
#[derive(Debug)]
pub(crate) enum Doubt {
    /// Send these probes: the resolver and the name to ask it for. Then cancel [`Asked::probed`].
    Probe(Vec<(Upstream, String)>),
    /// That is being done.
    Wait,
    /// The verdict of a moment ago stands.
    Known,
}

#[derive(Debug, Default)]
struct State {
    asked: HashMap<Key, Arc<Asked>>,
    /// First labels of probes on their way: of which resolver, for which name, since when.
    probes: HashMap<String, (Upstream, String, Instant)>,
    /// Resolvers that send the questions for a name back.
    loops: HashMap<(Upstream, String), Instant>,
    /// Names that were probed.
    probed: HashMap<String, Instant>,
}

#[derive(Debug, Default)]
pub(crate) struct Loops(Mutex<State>);

/// Keeps a question among those that wait.
#[derive(Debug)]
pub(crate) struct Asking<'a> {
    loops: &'a Loops,
    key: Key,
    asked: Arc<Asked>,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.loops.state().asked.remove(&self.key);
        self.asked.done.cancel();
    }
}

impl Loops {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These are being asked from now on, until the guard is dropped; or the same question waits already.
    pub(crate) fn begin(&self, key: Key, upstreams: &[Upstream]) -> Result<Asking<'_>, Arc<Asked>> {
        let mut state = self.state();
        if let Some(asked) = state.asked.get(&key) {
            return Err(Arc::clone(asked));
        }
        let asked = Arc::new(Asked { upstreams: upstreams.to_vec(), ..Asked::default() });
        state.asked.insert(key.clone(), Arc::clone(&asked));
        Ok(Asking { loops: self, key, asked })
    }

    /// The question for `name` that waits has arrived again: what shows where it comes from?
    pub(crate) fn doubt(&self, name: &str, asked: &Asked, now: Instant) -> Doubt {
        let mut state = self.state();
        if asked.probing.load(Ordering::Relaxed) {
            return Doubt::Wait;
        }
        if state.probed.get(name).is_some_and(|at| now < *at + VERDICT) {
            return Doubt::Known;
        }
        asked.probing.store(true, Ordering::Relaxed);
        insert(&mut state.probed, name.to_owned(), now, |at| *at);
        let probe = |upstream: &Upstream| {
            let nonce = lacis_wire::derp::random_nonce();
            let label = format!("{PREFIX}{:016x}", u64::from_le_bytes(*nonce.first_chunk()?));
            let mut below = name;
            while label.len() + 1 + below.len() > MAX_NAME {
                below = below.split_once('.')?.1;
            }
            let probe = (upstream.clone(), name.to_owned(), now);
            let asked = format!("{label}.{below}");
            insert(&mut state.probes, label, probe, |(_, _, at)| *at);
            Some((upstream.clone(), asked))
        };
        Doubt::Probe(asked.upstreams.iter().filter_map(probe).collect())
    }

    /// Whether a question that arrived is a probe of ours, which is noted.
    pub(crate) fn returned(&self, name: &str, now: Instant) -> bool {
        let label = name.split('.').next().unwrap_or_default();
        if !label.starts_with(PREFIX) {
            return false;
        }
        let mut state = self.state();
        let Some((upstream, name, sent)) = state.probes.remove(label) else { return false };
        if now < sent + PROBE_LIFE {
            if state.loops.keys().any(|(known, _)| *known == upstream) {
                tracing::debug!(%upstream, %name, "this name comes back as well");
            } else {
                tracing::warn!(%upstream, %name, "this resolver sends questions back to where they come from");
            }
            insert(&mut state.loops, (upstream, name), now, |at| *at);
        }
        true
    }

    /// Does a resolver send questions for this name back?
    pub(crate) fn is_loop(&self, upstream: &Upstream, name: &str, now: Instant) -> bool {
        let state = self.state();
        // Most often there are none.
        !state.loops.is_empty()
            && state.loops.get(&(upstream.clone(), name.to_owned())).is_some_and(|seen| now < *seen + VERDICT)
    }

    /// A resolver has answered the question for a name.
    pub(crate) fn answered(&self, upstream: &Upstream, name: &str) {
        let mut state = self.state();
        if !state.loops.is_empty() {
            state.loops.remove(&(upstream.clone(), name.to_owned()));
        }
    }

    /// Forgets resolvers that are not asked any more.
    pub(crate) fn retain(&self, is_asked: impl Fn(&Upstream) -> bool) {
        self.state().loops.retain(|(upstream, _), _| is_asked(upstream));
    }

    /// Resolvers that lead back here, each with one of the names that it was found with.
    pub(crate) fn found(&self, now: Instant) -> BTreeMap<String, String> {
        let state = self.state();
        let recent = state.loops.iter().filter(|(_, seen)| now < **seen + REPORTED);
        recent.map(|((upstream, name), _)| (upstream.to_string(), name.clone())).collect()
    }
}

/// Inserts, and takes out what is oldest where there is no place.
fn insert<K: std::hash::Hash + Eq + Clone, V>(
    table: &mut HashMap<K, V>,
    key: K,
    value: V,
    at: impl Fn(&V) -> Instant,
) {
    if table.len() >= MAX_ENTRIES
        && let Some(oldest) = table.iter().min_by_key(|(_, value)| at(value)).map(|(key, _)| key.clone())
    {
        table.remove(&oldest);
    }
    table.insert(key, value);
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "www.example";

    fn upstream(last: u8) -> Upstream {
        Upstream::Plain(([192, 0, 2, last], 53).into())
    }

    fn at(seconds: u64) -> Instant {
        // One origin for all tests.
        static ORIGIN: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        *ORIGIN.get_or_init(Instant::now) + Duration::from_secs(seconds)
    }

    fn probes(loops: &Loops, name: &str, upstreams: &[Upstream], now: Instant) -> Vec<(Upstream, String)> {
        let asked = Asked { upstreams: upstreams.to_vec(), ..Asked::default() };
        let Doubt::Probe(probes) = loops.doubt(name, &asked, now) else { panic!("no probes") };
        assert!(matches!(loops.doubt(name, &asked, now), Doubt::Wait));
        let other = Asked::default();
        assert!(matches!(loops.doubt(name, &other, now), Doubt::Known));
        probes
    }

    #[test]
    fn a_probe_that_returns_shows_which_resolver_leads_back() {
        let loops = Loops::default();
        let probes = probes(&loops, NAME, &[upstream(1), upstream(2)], at(0));
        assert_eq!(probes.len(), 2);
        assert!(probes.iter().all(|(_, name)| name.ends_with(".www.example")));
        assert!(!loops.returned(NAME, at(1)));
        assert!(!loops.returned("lacis-loop-0123456789abcdef.www.example", at(1)), "a guess");
        assert!(loops.returned(&probes[1].1, at(1)));
        assert!(loops.is_loop(&upstream(2), NAME, at(2)) && !loops.is_loop(&upstream(1), NAME, at(2)));
        assert!(!loops.is_loop(&upstream(2), "ftp.example", at(2)), "other names may take another way");
        assert_eq!(loops.found(at(2)), [(upstream(2).to_string(), NAME.to_owned())].into());
    }

    #[test]
    fn a_loop_is_looked_for_again_and_is_no_more_once_its_resolver_answers() {
        let loops = Loops::default();
        let probe = |now| probes(&loops, NAME, &[upstream(1)], now);
        assert!(loops.returned(&probe(at(0))[0].1, at(0)));
        assert!(!loops.is_loop(&upstream(1), NAME, at(30)), "asked once more");
        assert_eq!(loops.found(at(30)).len(), 1);
        loops.answered(&upstream(1), NAME);
        assert!(loops.found(at(30)).is_empty());
        assert!(loops.returned(&probe(at(40))[0].1, at(40)));
        assert!(loops.found(at(400)).is_empty(), "nobody asked for minutes");
        loops.retain(|known| *known != upstream(1));
        assert!(loops.found(at(41)).is_empty());
        let late = probe(at(80));
        assert!(loops.returned(&late[0].1, at(95)) && !loops.is_loop(&upstream(1), NAME, at(95)));
    }

    #[test]
    fn the_same_question_is_known_while_it_waits() {
        let loops = Loops::default();
        let key = || (NAME.to_owned(), 1);
        let first = loops.begin(key(), &[upstream(1)]).unwrap();
        let asked = loops.begin(key(), &[]).unwrap_err();
        assert_eq!(asked.upstreams, [upstream(1)]);
        assert!(loops.begin((NAME.to_owned(), 28), &[]).is_ok());
        drop(first);
        assert!(asked.done.is_cancelled());
        assert!(loops.begin(key(), &[]).is_ok());
    }

    #[test]
    fn a_probe_of_a_long_name_is_a_name_and_tables_are_bounded() {
        let loops = Loops::default();
        let long = [&"a".repeat(63); 4].map(String::as_str).join(".");
        for number in 0..MAX_ENTRIES + 10 {
            let name = format!("{number}.{}", &long[number.to_string().len() + 3..]);
            let probes = probes(&loops, &name, &[upstream(1)], at(number as u64));
            assert!(probes[0].1.len() <= MAX_NAME);
            assert!(loops.returned(&probes[0].1, at(number as u64)));
        }
        let state = loops.state();
        assert!(state.probed.len() <= MAX_ENTRIES && state.loops.len() <= MAX_ENTRIES);
    }
}
