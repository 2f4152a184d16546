//! The server's own keys and its state directory.
//!
//! `noise.key` is what clients know the server by, `relay.key` the embedded relay's. Each is made at the
//! first start, whole or not at all, and never replaced: whatever stands in its place is an error.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use lacis_wire::key::{KeyError, MachinePrivateKey, RelayPrivateKey};
use zeroize::Zeroizing;

use crate::Error;

const DIRECTORY_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
/// Permission bits of group and others.
const OTHERS: u32 = 0o077;

/// A state directory that belongs to this process alone, as long as the value lives.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// Locked; closing it unlocks.
    _lock: File,
}

impl StateDir {
    /// Makes the directory if it does not exist, and locks it.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let wrong = |doing, path: &Path, source| Error::State { doing, path: path.to_owned(), source };
        match DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(path) {
            Ok(()) => {}
            Err(source) => return Err(wrong("make the state directory", path, source)),
        }
        let lock_path = path.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(FILE_MODE)
            .open(&lock_path)
            .map_err(|source| wrong("write to the state directory", path, source))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(fs::TryLockError::WouldBlock) => Err(Error::Running { path: lock_path }),
            Err(fs::TryLockError::Error(source)) => Err(wrong("lock", &lock_path, source)),
        }
    }

    /// The directory's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What clients know the server by.
    pub fn noise_key(&self) -> Result<MachinePrivateKey, Error> {
        self.key("noise.key", MachinePrivateKey::generate, MachinePrivateKey::to_text)
    }

    /// The embedded relay's key.
    pub fn relay_key(&self) -> Result<RelayPrivateKey, Error> {
        self.key("relay.key", RelayPrivateKey::generate, RelayPrivateKey::to_text)
    }

    fn key<K: FromStr<Err = KeyError>>(
        &self,
        name: &str,
        generate: fn() -> K,
        to_text: fn(&K) -> Zeroizing<String>,
    ) -> Result<K, Error> {
        let path = self.path.join(name);
        match read(&path) {
            Ok(text) => {
                text.trim().parse().map_err(|error: KeyError| Error::KeyFile { path, why: error.to_string() })
            }
            Err(Problem::Exposed(mode)) => Err(Error::Exposed { path, mode }),
            Err(Problem::Io(error)) if error.kind() == io::ErrorKind::InvalidData => {
                Err(Error::KeyFile { path, why: "it is not text".to_owned() })
            }
            Err(Problem::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                let key = generate();
                write(&path, &to_text(&key)).map_err(|source| Error::State {
                    doing: "write the key",
                    path: path.clone(),
                    source,
                })?;
                tracing::info!(path = %path.display(), "made a new key");
                Ok(key)
            }
            Err(Problem::Io(source)) => Err(Error::State { doing: "read the key", path, source }),
        }
    }
}

enum Problem {
    Exposed(u32),
    Io(io::Error),
}

fn read(path: &Path) -> Result<Zeroizing<String>, Problem> {
    let metadata = fs::metadata(path).map_err(Problem::Io)?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & OTHERS != 0 {
        return Err(Problem::Exposed(mode));
    }
    fs::read_to_string(path).map(Zeroizing::new).map_err(Problem::Io)
}

/// Writes a new file that is whole once it has its name.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let temporary = path.with_extension("new");
    // What an interrupted start left behind.
    let _ = fs::remove_file(&temporary);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.write_all(b"\n")?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    // The name itself must survive a power cut too.
    if let Some(directory) = path.parent() {
        File::open(directory)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_made_once_with_closed_permissions_and_stay() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/state");
        let (noise, relay) = {
            let state = StateDir::open(&path).unwrap();
            (state.noise_key().unwrap(), state.relay_key().unwrap())
        };
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(path.join("noise.key")).unwrap().permissions().mode() & 0o777, 0o600);
        let state = StateDir::open(&path).unwrap();
        assert_eq!(state.noise_key().unwrap(), noise);
        assert_eq!(state.relay_key().unwrap(), relay);
    }

    #[test]
    fn a_second_coordinator_is_refused_while_the_first_lives() {
        let directory = tempfile::tempdir().unwrap();
        let first = StateDir::open(directory.path()).unwrap();
        let error = StateDir::open(directory.path()).unwrap_err().to_string();
        assert!(error.starts_with("another coordinator is running"), "{error}");
        drop(first);
        StateDir::open(directory.path()).unwrap();
    }

    #[test]
    fn an_exposed_or_damaged_key_is_an_error_and_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDir::open(directory.path()).unwrap();
        state.noise_key().unwrap();
        let path = directory.path().join("noise.key");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = state.noise_key().unwrap_err().to_string();
        assert!(error.contains("may be read by others (mode 644)"), "{error}");
        for garbage in [&b"garbage"[..], b"", b"\xff\xfe", b"privkey:00"] {
            fs::write(&path, garbage).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            let error = state.noise_key().unwrap_err().to_string();
            assert!(error.contains("does not hold a private key"), "{error}");
            assert_eq!(fs::read(&path).unwrap(), garbage);
        }
    }

    #[test]
    fn a_file_in_the_place_of_the_directory_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "").unwrap();
        let error = StateDir::open(&path).unwrap_err().to_string();
        assert!(error.contains("cannot make the state directory") && error.contains("file"), "{error}");
    }
}
