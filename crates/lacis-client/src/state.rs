//! What the daemon keeps over a restart: its keys, the user's preferences and the last network map.
//!
//! Everything is in one directory of mode 0700 that one daemon at a time owns. `state.json` has the keys and the
//! preferences, `netmap.zst` the map; both are replaced whole, so a crash leaves the old or the new one.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use lacis_wire::control::{MapResponse, UserProfile};
use lacis_wire::key::{DiscoPrivateKey, LockKey, MachineKey, MachinePrivateKey, NodeKey, NodePrivateKey};
use lacis_wire::local::Prefs;
use lacis_wire::mapframe::MAX_MESSAGE;
use lacis_wire::text;
use serde::{Deserialize, Serialize};

use crate::Error;

const STATE: &str = "state.json";
const NETMAP: &str = "netmap.zst";
const LOCK: &str = "lock";
/// The fastest level; a map is written seldom and is small.
const NETMAP_LEVEL: i32 = 1;

/// The contents of `state.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Saved {
    pub machine_key: MachinePrivateKey,
    /// None before the first login and after a logout.
    #[serde(default)]
    pub node_key: Option<NodePrivateKey>,
    /// The key of a login that is under way. Kept, so that a crash does not waste a single-use auth key.
    #[serde(default)]
    pub pending_key: Option<NodePrivateKey>,
    /// The key that the next login replaces.
    #[serde(default)]
    pub old_node_key: Option<NodeKey>,
    /// Keys that were given up and are not expired at their servers yet.
    #[serde(default)]
    pub departures: Vec<Departure>,
    /// Kept, so that peers need not learn a new one after a restart; they cannot while the control server is away. Replaced
    /// when the clock was set back.
    pub disco_key: DiscoPrivateKey,
    pub lock_key: LockKey,
    pub log_id: String,
    #[serde(default)]
    pub prefs: Prefs,
    #[serde(default)]
    pub profile: UserProfile,
    #[serde(default)]
    pub stable_id: String,
    /// The server's key and address, by which it is found while DNS is away.
    #[serde(default)]
    pub server_key: Option<MachineKey>,
    #[serde(default)]
    pub server_address: Option<IpAddr>,
    /// The UDP port in use, so that mappings of routers and endpoints stay true.
    #[serde(default)]
    pub port: u16,
    /// The latest time that this host's clock has shown, roughly. Unix seconds.
    #[serde(default)]
    pub latest_time: i64,
    #[serde(default)]
    pub home_region: u16,
    /// Where this node was reachable last.
    #[serde(default)]
    pub endpoints: Vec<SocketAddr>,
    /// By which direct ways peers were reached last: a restart finds them again, even while the server is away.
    #[serde(default)]
    pub ways: Vec<(NodeKey, SocketAddr)>,
}

/// A node key that this host has given up, and the server where it may still be valid.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Departure {
    pub control_url: String,
    pub node_key: NodePrivateKey,
    #[serde(default)]
    pub server_key: Option<MachineKey>,
    #[serde(default)]
    pub server_address: Option<IpAddr>,
    /// Unix seconds.
    pub since: i64,
}

impl Saved {
    fn new() -> Self {
        let disco_key = DiscoPrivateKey::generate();
        Self {
            machine_key: MachinePrivateKey::generate(),
            node_key: None,
            pending_key: None,
            old_node_key: None,
            departures: Vec::new(),
            lock_key: LockKey::from_bytes(*NodePrivateKey::generate().public().as_bytes()),
            log_id: disco_key.public().to_string().rsplit(':').next().unwrap_or_default().to_owned(),
            disco_key,
            prefs: Prefs::default(),
            profile: UserProfile::default(),
            stable_id: String::new(),
            server_key: None,
            server_address: None,
            port: 0,
            latest_time: 0,
            home_region: 0,
            endpoints: Vec::new(),
            ways: Vec::new(),
        }
    }

    /// Is there a login to go on with?
    pub(crate) fn is_logged_in(&self) -> bool {
        self.node_key.is_some() && !self.prefs.logged_out
    }

    /// Forgets who this node was; the next login is a new one. The machine stays the same.
    pub(crate) fn forget_login(&mut self) {
        self.node_key = None;
        self.pending_key = None;
        self.old_node_key = None;
        self.profile = UserProfile::default();
        self.stable_id.clear();
        self.home_region = 0;
    }
}

/// Does the directory have files, and none of them ours?
fn is_shared(path: &Path) -> io::Result<bool> {
    Ok(fs::read_dir(path)?.next().is_some() && !path.join(STATE).exists() && !path.join(LOCK).exists())
}

/// The state directory, locked as long as this lives.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    _lock: File,
}

impl StateDir {
    /// Opens the directory, making it if need be.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let failed = |doing, source| Error::State { doing, path: path.to_owned(), source };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|source| failed("making the state directory", source))?;
        let mode =
            fs::metadata(path).map_err(|source| failed("reading the state directory", source))?.permissions();
        if mode.mode() & 0o7777 != 0o700 {
            // A slip such as `--state-dir /tmp` must not lock everybody else out of it.
            if is_shared(path).map_err(|source| failed("reading the state directory", source))? {
                return Err(Error::StateDirShared { path: path.to_owned() });
            }
            fs::set_permissions(path, fs::Permissions::from_mode(0o700))
                .map_err(|source| failed("restricting the state directory to its owner", source))?;
        }
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path.join(LOCK))
            .map_err(|source| failed("opening the lock in the state directory", source))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(fs::TryLockError::WouldBlock) => Err(Error::StateInUse { path: path.to_owned() }),
            Err(fs::TryLockError::Error(source)) => Err(failed("locking the state directory", source)),
        }
    }

    /// What was saved, or a new identity that is saved at once.
    pub(crate) fn load(&self) -> Result<Saved, Error> {
        let path = self.path.join(STATE);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|source| Error::StateDamaged { path, source }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let new = Saved::new();
                self.save(&new)?;
                Ok(new)
            }
            Err(source) => Err(Error::State { doing: "reading", path, source }),
        }
    }

    pub(crate) fn save(&self, saved: &Saved) -> Result<(), Error> {
        let path = self.path.join(STATE);
        let text = zeroize::Zeroizing::new(
            serde_json::to_vec_pretty(saved)
                .map_err(|source| Error::StateDamaged { path: path.clone(), source })?,
        );
        self.replace(STATE, &text)
    }

    /// Is a map kept?
    pub(crate) fn has_netmap(&self) -> bool {
        self.path.join(NETMAP).exists()
    }

    /// The last network map. A damaged one is no loss: the server sends another.
    pub(crate) fn load_netmap(&self) -> Option<MapResponse> {
        let path = self.path.join(NETMAP);
        let packed = fs::read(&path).ok()?;
        let read = || -> Result<MapResponse, Box<dyn std::error::Error>> {
            // A damaged file must not take all memory.
            let limit = MAX_MESSAGE.min(packed.len().saturating_mul(1000));
            let message = String::from_utf8(zstd::bulk::decompress(&packed, limit)?)?;
            Ok(serde_json::from_str(&text::plain_json(&message)?)?)
        };
        read()
            .inspect_err(
                |error| tracing::warn!(path = %path.display(), %error, "the saved network map is ignored"),
            )
            .ok()
    }

    pub(crate) fn save_netmap(&self, map: &MapResponse) -> Result<(), Error> {
        let text = lacis_wire::control::to_json(map);
        let packed = zstd::bulk::compress(&text, NETMAP_LEVEL).map_err(|source| Error::State {
            doing: "compressing",
            path: self.path.join(NETMAP),
            source,
        })?;
        self.replace(NETMAP, &packed)
    }

    /// Forgets the map of a network that this node has left.
    pub(crate) fn remove_netmap(&self) {
        let path = self.path.join(NETMAP);
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove the saved network map");
        }
    }

    fn replace(&self, name: &str, content: &[u8]) -> Result<(), Error> {
        let path = self.path.join(name);
        let new = self.path.join(format!("{name}.new"));
        let write = || {
            let mut file =
                OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
            file.write_all(content)?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        write().map_err(|source| Error::State { doing: "writing", path: path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_loaded_and_nobody_else_can_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let state = StateDir::open(&path).unwrap();
        let mut saved = state.load().unwrap();
        saved.prefs.hostname = "bob".into();
        saved.node_key = Some(NodePrivateKey::generate());
        state.save(&saved).unwrap();
        drop(state);
        let state = StateDir::open(&path).unwrap();
        let again = state.load().unwrap();
        assert_eq!(again.prefs.hostname, "bob");
        assert_eq!(again.machine_key.public(), saved.machine_key.public());
        assert_eq!(again.node_key.unwrap().public(), saved.node_key.unwrap().public());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o700);
        assert_eq!(mode(&path.join(STATE)), 0o600);
    }

    #[test]
    fn a_directory_of_others_is_refused_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let open = |mode: u32| {
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
            StateDir::open(dir.path()).map(drop)
        };
        fs::write(dir.path().join("theirs"), "").unwrap();
        let error = open(0o755).unwrap_err();
        assert!(matches!(error, Error::StateDirShared { .. }), "{error}");
        assert_eq!(fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o755);
        fs::remove_file(dir.path().join("theirs")).unwrap();
        open(0o755).unwrap();
        assert_eq!(fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o700);
        open(0o755).unwrap();
    }

    #[test]
    fn a_second_daemon_is_told_that_the_first_runs() {
        let dir = tempfile::tempdir().unwrap();
        let _first = StateDir::open(dir.path()).unwrap();
        let error = StateDir::open(dir.path()).unwrap_err();
        assert!(matches!(error, Error::StateInUse { .. }), "{error}");
    }

    #[test]
    fn damaged_state_is_an_error_and_a_damaged_map_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        fs::write(dir.path().join(STATE), "{ no json").unwrap();
        let error = state.load().unwrap_err();
        assert!(error.to_string().contains("move it away"), "{error}");
        fs::write(dir.path().join(NETMAP), "no zstd").unwrap();
        assert!(state.load_netmap().is_none());
        let map = MapResponse { domain: "lab.example".into(), ..MapResponse::default() };
        state.save_netmap(&map).unwrap();
        assert_eq!(state.load_netmap().unwrap(), map);
    }
}
