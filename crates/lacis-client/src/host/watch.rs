//! Changes of files, by inotify(7): of those that decide which resolvers this host has.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::net::unix::pipe;
use tokio::time::{Instant, sleep_until};

/// What belongs together comes within this time of the first.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// Room for some events with their names.
const BUFFER: usize = 4096;

/// Watches some files, each also where it is not there yet or is replaced; of folders, what is in them.
#[derive(Debug)]
pub(crate) struct FileWatch {
    /// `None`: the kernel has no more watches for us, and whoever waits has to look from time to time.
    ///
    /// An inotify descriptor is read as a pipe is.
    events: Option<pipe::Receiver>,
    /// Of each watched folder, the names that count; none for all.
    names: HashMap<i32, Vec<OsString>>,
    /// When a change was noticed.
    noticed: Option<Instant>,
}

impl FileWatch {
    /// From now on: what is read after this call is current until [`FileWatch::changed`].
    pub(crate) fn new(files: &[PathBuf]) -> Self {
        let descriptor = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC);
        let events = descriptor.map_err(io::Error::from).and_then(pipe::Receiver::from_owned_fd_unchecked);
        if let Err(error) = &events {
            tracing::debug!(%error, "changes of files are noticed late");
        }
        let mut watch = Self { events: events.ok(), names: HashMap::new(), noticed: None };
        for file in files {
            watch.add(file);
        }
        watch
    }

    fn add(&mut self, file: &Path) {
        let in_folder =
            WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVED_FROM | WatchFlags::MOVED_TO;
        // The file itself too: the folder says nothing of one that is mounted there.
        let itself = WatchFlags::CLOSE_WRITE | WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF;
        if file.is_dir() {
            if let Some(watched) = self.watch(file, in_folder | itself) {
                self.names.remove(&watched);
            }
            return;
        }
        self.watch(file, itself);
        let (Some(folder), Some(name)) = (file.parent(), file.file_name()) else { return };
        if let Some(watched) = self.watch(folder, in_folder | itself) {
            self.names.entry(watched).or_default().push(name.to_owned());
        }
    }

    fn watch(&self, path: &Path, what: WatchFlags) -> Option<i32> {
        // What is not there yet is noticed by its folder, or not at all.
        inotify::add_watch(self.events.as_ref()?, path, what).ok()
    }

    /// Waits until one of them was changed; for ever, where the kernel does not say. Who stops waiting misses nothing.
    pub(crate) async fn changed(&mut self) {
        let noticed = match (self.noticed, &self.events) {
            (Some(noticed), _) => noticed,
            (None, None) => return std::future::pending().await,
            (None, Some(events)) => loop {
                if events.readable().await.is_err() {
                    return std::future::pending().await;
                }
                match events.try_io(|| self.read(events)) {
                    Ok(()) => break Instant::now(),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => return std::future::pending().await,
                }
            },
        };
        self.noticed = Some(noticed);
        sleep_until(noticed + DEBOUNCE).await;
    }

    /// Reads all that there is. `WouldBlock` if nothing of it counts.
    fn read(&self, events: &pipe::Receiver) -> io::Result<()> {
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut events = inotify::Reader::new(events, &mut buffer);
        let mut counts = false;
        loop {
            match events.next() {
                Ok(event) if event.events().contains(ReadFlags::IGNORED) => {}
                Ok(event) => {
                    let name = event.file_name();
                    let among = |names: &Vec<OsString>| {
                        name.is_none_or(|name| names.iter().any(|known| known.as_bytes() == name.to_bytes()))
                    };
                    counts |= self.names.get(&event.wd()).is_none_or(among);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if counts => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use tokio::time::timeout;

    /// Does it notice what is done?
    async fn notices(files: &[PathBuf], act: impl FnOnce()) -> bool {
        let mut watch = FileWatch::new(files);
        act();
        timeout(Duration::from_secs(1), watch.changed()).await.is_ok()
    }

    #[tokio::test]
    async fn a_file_is_followed_however_it_is_changed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let files = [at("file"), at("records"), at("gone/file")];
        fs::create_dir(at("records")).unwrap();
        assert!(notices(&files, || fs::write(at("file"), "1").unwrap()).await, "made");
        assert!(notices(&files, || fs::write(at("file"), "2").unwrap()).await, "written");
        fs::write(at("new"), "3").unwrap();
        assert!(notices(&files, || fs::rename(at("new"), at("file")).unwrap()).await, "replaced");
        assert!(notices(&files, || fs::remove_file(at("file")).unwrap()).await, "removed");
        let link = || std::os::unix::fs::symlink("records", at("file")).unwrap();
        assert!(notices(&files, link).await, "linked");
        assert!(notices(&files, || fs::write(at("records/one"), "").unwrap()).await, "in a folder");
    }

    #[tokio::test]
    async fn what_happens_beside_it_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "1").unwrap();
        let mut watch = FileWatch::new(&[at("file")]);
        fs::write(at("other"), "1").unwrap();
        fs::read(at("file")).unwrap();
        assert!(timeout(Duration::from_millis(200), watch.changed()).await.is_err());
        fs::write(at("file"), "1").unwrap();
        assert!(timeout(Duration::from_secs(1), watch.changed()).await.is_ok(), "and this does");
    }
}
