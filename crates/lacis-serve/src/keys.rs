//! State directories, and the private keys in them.
//!
//! A key is made at the first start, whole or not at all, readable by its owner alone, and never replaced: whatever
//! stands in its place is an error.

use std::fmt::Display;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

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
    /// Makes the directory if it does not exist, and locks it for `program`, which errors name.
    pub fn open(path: &Path, program: &'static str) -> Result<Self, Error> {
        make_directory(path)?;
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
            Err(fs::TryLockError::WouldBlock) => Err(Error::Running { program, path: lock_path }),
            Err(fs::TryLockError::Error(source)) => Err(wrong("lock", &lock_path, source)),
        }
    }

    /// The directory's path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn wrong(doing: &'static str, path: &Path, error: io::Error) -> Error {
    Error::State { doing, path: path.to_owned(), error }
}

/// Makes a state directory and what is above it, closed to others, if it does not exist.
pub fn make_directory(path: &Path) -> Result<(), Error> {
    DirBuilder::new()
        .recursive(true)
        .mode(DIRECTORY_MODE)
        .create(path)
        .map_err(|source| wrong("make the state directory", path, source))
}

/// Reads a private key in text form, or makes one where there is no file.
pub fn load_or_generate<K>(
    path: &Path,
    generate: fn() -> K,
    to_text: fn(&K) -> Zeroizing<String>,
) -> Result<K, Error>
where
    K: FromStr<Err: Display>,
{
    match read(path)? {
        Some(text) => text
            .trim()
            .parse()
            .map_err(|error: K::Err| Error::KeyFile { path: path.to_owned(), why: error.to_string() }),
        None => {
            let key = generate();
            write(path, &to_text(&key)).map_err(|source| wrong("write the key", path, source))?;
            tracing::info!(path = %path.display(), "made a new key");
            Ok(key)
        }
    }
}

/// The text of a key file that its owner alone may read; `None` if there is none.
fn read(path: &Path) -> Result<Option<Zeroizing<String>>, Error> {
    let cannot = |source| wrong("read the key", path, source);
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(cannot(error)),
    };
    let mode = file.metadata().map_err(cannot)?.permissions().mode() & 0o777;
    if mode & OTHERS != 0 {
        return Err(Error::Exposed { path: path.to_owned(), mode });
    }
    let mut text = Zeroizing::new(String::new());
    match file.read_to_string(&mut text) {
        Ok(_) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Err(Error::KeyFile { path: path.to_owned(), why: "it is not text".to_owned() })
        }
        Err(error) => Err(cannot(error)),
    }
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

    /// A stand-in for the programs' keys.
    #[derive(Debug, PartialEq)]
    struct Key(u32);

    impl FromStr for Key {
        type Err = std::num::ParseIntError;

        fn from_str(text: &str) -> Result<Self, Self::Err> {
            text.parse().map(Self)
        }
    }

    fn load(path: &Path) -> Result<Key, Error> {
        load_or_generate(path, || Key(42), |key| Zeroizing::new(key.0.to_string()))
    }

    #[test]
    fn keys_are_made_once_with_closed_permissions_and_stay() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/state");
        let state = StateDir::open(&path, "coordinator").unwrap();
        let key = state.path().join("noise.key");
        assert_eq!(load(&key).unwrap(), Key(42));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(&key, "7\n").unwrap();
        assert_eq!(load(&key).unwrap(), Key(7));
    }

    #[test]
    fn a_second_process_is_refused_while_the_first_lives() {
        let directory = tempfile::tempdir().unwrap();
        let first = StateDir::open(directory.path(), "coordinator").unwrap();
        let error = StateDir::open(directory.path(), "coordinator").unwrap_err().to_string();
        assert!(error.starts_with("another coordinator is running"), "{error}");
        drop(first);
        StateDir::open(directory.path(), "coordinator").unwrap();
    }

    #[test]
    fn an_exposed_or_damaged_key_is_an_error_and_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("noise.key");
        load(&path).unwrap();
        for mode in [0o644, 0o640, 0o604, 0o660] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = load(&path).unwrap_err().to_string();
            assert!(error.contains(&format!("may be read by others (mode {mode:o})")), "{error}");
            assert!(error.contains(&format!("chmod 600 {}", path.display())), "{error}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        for garbage in [&b"garbage"[..], b"", b"\xff\xfe", b"-1"] {
            fs::write(&path, garbage).unwrap();
            let error = load(&path).unwrap_err().to_string();
            assert!(error.contains("does not hold a private key"), "{error}");
            assert_eq!(fs::read(&path).unwrap(), garbage);
        }
    }

    #[test]
    fn a_file_in_the_place_of_the_directory_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "").unwrap();
        let error = StateDir::open(&path, "coordinator").unwrap_err().to_string();
        assert!(error.contains("cannot make the state directory") && error.contains("file"), "{error}");
    }
}
