//! `/etc/resolv.conf` written by ourselves, where no other program gives the host its names. The file that was there is
//! kept inside ours ([`super::resolv_conf`]) and put back, after a crash at the next start.
//!
//! Under systemd this file is all that the daemon may write in `/etc` (`ReadWritePaths=` in its unit, which mounts the
//! file on itself): then it is not replaced but written in place, and a link is followed. When another program replaces
//! the file, the mount is gone with it, and so is the right to write, until the unit is started again.

use std::fs;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::Instant;

use lacis_dns::OsDns;

use super::repairs::Repairs;
use super::resolv_conf::{self, Before, Ours};
use super::resolver::ResolverError;

const MODE: u32 = 0o644;
/// What to do when the daemon may not write the file.
const READ_ONLY: &str = "the service may write only the file that was there when it was started: `systemctl restart lacisd` after another program has replaced it, or let systemd-resolved or resolvconf manage it";
const NOT_OURS: &str = "it is immutable (`lsattr` shows it, `chattr -i` ends it) or another user's; or let systemd-resolved manage it (`ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf`)";

#[derive(Debug)]
pub(super) struct Direct {
    path: PathBuf,
    /// Our text as it was written last.
    written: Vec<u8>,
    repairs: Repairs,
    /// Who wrote over ours last, in words.
    writer: String,
}

/// What there is.
#[derive(Debug)]
struct Found {
    text: Option<Vec<u8>>,
    is_link: bool,
    is_ours: bool,
    before: Before,
}

impl Direct {
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            written: Vec::new(),
            repairs: Repairs::default(),
            writer: String::new(),
        }
    }

    fn look(&self) -> Result<Found, ResolverError> {
        let link = fs::read_link(&self.path).ok();
        let is_link = link.is_some();
        let text = match fs::read(&self.path) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed("reading", &self.path)(error)),
        };
        let (is_ours, before) = match text.as_deref().and_then(Before::inside) {
            Some(Ours::Complete(before)) => (true, before),
            Some(Ours::Incomplete) => return Err(ResolverError::Incomplete(self.path.clone())),
            None => (false, Before { text: text.clone().filter(|_| !is_link), link }),
        };
        Ok(Found { text, is_link, is_ours, before })
    }

    /// Puts back what a daemon that crashed left.
    pub(super) fn recover(&mut self) {
        match self.look() {
            Ok(found) if found.is_ours => {
                tracing::info!("resolv.conf is put back: an earlier lacisd could not");
                if let Err(error) = self.revert() {
                    tracing::warn!(%error, "resolv.conf is not as it was");
                }
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "resolv.conf is left as it is"),
        }
    }

    pub(super) fn set(&mut self, dns: &OsDns) -> Result<(), ResolverError> {
        let found = self.look()?;
        self.put(dns, found)
    }

    fn text(&self, dns: &OsDns, before: &Before) -> Vec<u8> {
        resolv_conf::ours(dns, before, &before.in_force(&self.path))
    }

    fn put(&mut self, dns: &OsDns, found: Found) -> Result<(), ResolverError> {
        let mut ours = self.text(dns, &found.before);
        if found.text.as_ref() == Some(&ours) {
            self.written = ours;
            self.repairs.stands();
            return Ok(());
        }
        // What is ours behind a link was written through it.
        let replaced = !(found.is_link && found.is_ours) && self.replace(&ours).is_ok();
        if !replaced {
            if found.is_link && !found.is_ours {
                // The link stays.
                ours = self.text(dns, &Before { link: None, text: found.text });
            }
            write_in_place(&self.path, &ours).map_err(|error| self.not_written(error))?;
        }
        self.written = ours;
        self.repairs.wrote(Instant::now());
        Ok(())
    }

    pub(super) fn revert(&mut self) -> Result<(), ResolverError> {
        let found = self.look()?;
        self.written.clear();
        self.repairs = Repairs::default();
        if !found.is_ours {
            return Ok(());
        }
        match (&found.before.link, found.before.text) {
            (Some(target), _) => self.relink(target).map_err(|error| self.not_written(error)),
            (None, Some(text)) => {
                // What is ours behind a link was written through it.
                let replaced = !found.is_link && self.replace(&text).is_ok();
                let written = if replaced { Ok(()) } else { write_in_place(&self.path, &text) };
                written.map_err(|error| self.not_written(error))
            }
            (None, None) => {
                // Behind a link it is the target that was not there.
                let file = fs::canonicalize(&self.path).map_err(failed("reading", &self.path))?;
                match remove(&file) {
                    // The folder cannot be written.
                    Err(_) => write_in_place(&file, b"").map_err(|error| self.not_written(error)),
                    Ok(()) => Ok(()),
                }
            }
        }
    }

    /// Writes it again if another program has, or if what is in force below ours is something else now.
    pub(super) fn repair(&mut self, dns: &OsDns) -> Result<(), ResolverError> {
        let found = self.look()?;
        let now = Instant::now();
        let intact = found.text.as_ref() == Some(&self.written);
        if !intact {
            self.writer = writer(&found);
            if !self.repairs.is_due(now) {
                return Ok(());
            }
            tracing::info!(path = %self.path.display(), "{} has written over it; writing it again", self.writer);
        }
        self.put(dns, found)
    }

    /// When to look at the file again, whatever happens to it.
    pub(super) fn due(&self) -> Option<Instant> {
        self.repairs.due()
    }

    /// What the user should know of other programs.
    pub(super) fn complaint(&self) -> Option<String> {
        self.repairs.insists(Instant::now()).then(|| {
            let path = self.path.display();
            format!(
                "{} keeps writing over {path}: names of the mesh resolve only now and then. Let it leave the file alone, or let systemd-resolved or resolvconf manage it",
                self.writer
            )
        })
    }

    /// The text that the host goes by without us.
    pub(super) fn in_force(&self) -> String {
        self.look().map(|found| found.before.in_force(&self.path)).unwrap_or_default()
    }

    /// The servers that the host has without us.
    pub(super) fn base_resolvers(&self) -> Vec<SocketAddr> {
        resolv_conf::servers(&self.in_force())
    }

    /// The files that decide.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let before = self.look().map(|found| found.before).unwrap_or_default();
        std::iter::once(self.path.clone()).chain(before.target(&self.path)).collect()
    }

    /// Makes the file the link again that it was.
    fn relink(&self, target: &Path) -> io::Result<()> {
        let new = self.new_file();
        remove(&new)?;
        symlink(target, &new)?;
        fs::rename(&new, &self.path)
    }

    /// Where a file is made before it takes the place of the present one.
    fn new_file(&self) -> PathBuf {
        self.path.with_extension("conf.lacis")
    }

    /// Whole and at once; not where the file is a mount of its own, as in containers and under systemd.
    fn replace(&self, text: &[u8]) -> io::Result<()> {
        let new = self.new_file();
        let replaced = fs::File::create(&new)
            .and_then(|mut file| file.write_all(text).and_then(|()| file.sync_all()))
            .and_then(|()| fs::set_permissions(&new, fs::Permissions::from_mode(MODE)))
            .and_then(|()| fs::rename(&new, &self.path));
        replaced.inspect_err(|_| drop(fs::remove_file(&new)))
    }

    fn not_written(&self, source: io::Error) -> ResolverError {
        let path = self.path.display();
        let doing = match source.kind() {
            io::ErrorKind::ReadOnlyFilesystem => format!("writing {path} ({READ_ONLY})"),
            io::ErrorKind::PermissionDenied => format!("writing {path} ({NOT_OURS})"),
            _ => format!("writing {path}"),
        };
        ResolverError::File { doing, source }
    }
}

fn failed(doing: &str, path: &Path) -> impl FnOnce(io::Error) -> ResolverError {
    let doing = format!("{doing} {}", path.display());
    move |source| ResolverError::File { doing, source }
}

/// Who has written what is there now.
fn writer(found: &Found) -> String {
    let text = found.text.as_deref().map(String::from_utf8_lossy);
    match text.as_deref().and_then(resolv_conf::written_by) {
        _ if found.text.is_none() => "another program, which removes it,".to_owned(),
        _ if found.is_ours => "another program, which changes lines of ours,".to_owned(),
        Some(said) => format!("another program (its file begins with {said:?})"),
        None => "another program, which empties it,".to_owned(),
    }
}

/// The new text over the old one, which is cut only then: whoever reads meanwhile never finds an empty file.
fn write_in_place(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(false).mode(MODE).open(path)?;
    file.write_all(text)?;
    file.set_len(text.len() as u64)?;
    file.sync_all()
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacis_dns::QUAD100_V4;

    const THEIRS: &str = "# mine\nnameserver 192.0.2.1\nsearch home.example\n";

    fn dns() -> OsDns {
        OsDns {
            servers: vec![QUAD100_V4.into()],
            search: vec!["lab.example".into()],
            match_domains: vec!["lab.example".into()],
        }
    }

    fn server(text: &str) -> Vec<SocketAddr> {
        vec![format!("{text}:53").parse().unwrap()]
    }

    /// A folder with a `resolv.conf` of these words.
    fn folder(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        fs::write(&path, text).unwrap();
        (dir, path)
    }

    #[test]
    fn the_file_is_replaced_and_put_back_even_after_a_crash() {
        let (_dir, path) = folder(THEIRS);
        let mut direct = Direct::new(&path);
        direct.set(&dns()).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("nameserver 100.100.100.100\nsearch lab.example home.example\n"), "{text}");
        assert_eq!(direct.base_resolvers(), server("192.0.2.1"));
        direct.set(&dns()).unwrap();
        // Here it crashes, and another one starts, which knows nothing but the file.
        let mut again = Direct::new(&path);
        assert_eq!(again.base_resolvers(), server("192.0.2.1"));
        again.recover();
        assert_eq!(fs::read_to_string(&path).unwrap(), THEIRS);
        again.revert().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), THEIRS, "reverting twice does nothing");
    }

    #[test]
    fn a_file_of_ours_without_what_was_there_before_is_not_removed() {
        let (_dir, path) = folder("# Written by lacisd. Cut off\nnameserver 100.100.100.100\n");
        let before = fs::read(&path).unwrap();
        let mut direct = Direct::new(&path);
        direct.recover();
        let error = direct.revert().unwrap_err().to_string();
        assert!(error.contains("resolv.conf"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), before);
        assert!(direct.base_resolvers().is_empty());
        let error = direct.set(&dns()).unwrap_err().to_string();
        assert!(error.contains("nameserver"), "{error}");
    }

    #[test]
    fn where_there_was_no_file_there_is_none_afterwards() {
        let (_dir, path) = folder("");
        fs::remove_file(&path).unwrap();
        let mut direct = Direct::new(&path);
        direct.set(&dns()).unwrap();
        assert!(path.exists());
        Direct::new(&path).recover();
        assert!(!path.exists());
    }

    #[test]
    fn a_link_is_a_link_again_afterwards_and_its_target_counts_meanwhile() {
        let (dir, path) = folder("");
        let target = dir.path().join("theirs");
        fs::write(&target, "nameserver 192.0.2.1\n").unwrap();
        fs::remove_file(&path).unwrap();
        symlink("theirs", &path).unwrap();
        let mut direct = Direct::new(&path);
        direct.set(&dns()).unwrap();
        assert!(direct.look().unwrap().is_ours && !path.is_symlink());
        assert_eq!(fs::read_to_string(&target).unwrap(), "nameserver 192.0.2.1\n", "theirs is not written");
        assert_eq!(direct.base_resolvers(), server("192.0.2.1"));
        assert_eq!(direct.files(), [path.clone(), target.clone()]);
        // Its owner goes on writing it.
        fs::write(&target, "nameserver 192.0.2.2\noptions timeout:1\n").unwrap();
        assert_eq!(direct.base_resolvers(), server("192.0.2.2"));
        direct.repair(&dns()).unwrap();
        assert!(fs::read_to_string(&path).unwrap().contains("options timeout:1\n"));
        assert!(direct.due().is_none() && direct.complaint().is_none(), "that is no fight");
        direct.revert().unwrap();
        assert_eq!(fs::read_link(&path).unwrap(), Path::new("theirs"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing else is left");
    }

    /// A place where no file can be made beside `resolv.conf`, so that it cannot be replaced.
    fn without_replacing(path: &Path) -> Direct {
        let direct = Direct::new(path);
        fs::create_dir_all(direct.new_file().join("in-the-way")).unwrap();
        direct
    }

    #[test]
    fn a_file_that_cannot_be_replaced_is_written_in_place_and_put_back() {
        let before = format!("# {}\nnameserver 192.0.2.1\n", "mine ".repeat(100));
        let (_dir, path) = folder(&before);
        let mut direct = without_replacing(&path);
        let open = fs::File::open(&path).unwrap();
        direct.set(&dns()).unwrap();
        let text = io::read_to_string(&open).unwrap();
        assert!(text.contains("nameserver 100.100.100.100\nsearch lab.example\n"), "{text}");
        assert_eq!(direct.base_resolvers(), server("192.0.2.1"));
        Direct::new(&path).recover();
        assert_eq!(fs::read_to_string(&path).unwrap(), before);
    }

    #[test]
    fn a_link_that_cannot_be_replaced_is_followed_and_stays() {
        let (dir, path) = folder("");
        let target = dir.path().join("theirs");
        fs::remove_file(&path).unwrap();
        symlink("theirs", &path).unwrap();
        for before in [Some("nameserver 192.0.2.1\n"), None] {
            let _ = fs::remove_file(&target);
            if let Some(text) = before {
                fs::write(&target, text).unwrap();
            }
            let mut direct = without_replacing(&path);
            direct.set(&dns()).unwrap();
            assert!(fs::read_to_string(&target).unwrap().contains("100.100.100.100"));
            fs::remove_dir_all(direct.new_file()).unwrap();
            let mut again = Direct::new(&path);
            again.set(&OsDns::default()).unwrap();
            assert!(path.is_symlink(), "also where it could be replaced now");
            again.revert().unwrap();
            assert_eq!(fs::read_to_string(&target).ok().as_deref(), before);
            assert_eq!(fs::read_link(&path).unwrap(), Path::new("theirs"));
        }
    }

    #[test]
    fn what_another_program_wrote_counts_at_once_and_ours_comes_back() {
        let (dir, path) = folder(THEIRS);
        let mut direct = Direct::new(&path);
        direct.set(&dns()).unwrap();
        // In place, as a shell does, and by another file in its place, as NetworkManager and dhclient do.
        fs::write(&path, "nameserver 192.0.2.7\n").unwrap();
        assert_eq!(direct.base_resolvers(), server("192.0.2.7"));
        direct.repair(&dns()).unwrap();
        assert!(direct.look().unwrap().is_ours);
        let new = dir.path().join("new");
        fs::write(&new, "# Generated by NetworkManager\nnameserver 192.0.2.8\n").unwrap();
        fs::rename(&new, &path).unwrap();
        direct.repair(&dns()).unwrap();
        assert_eq!(direct.base_resolvers(), server("192.0.2.8"));
        direct.revert().unwrap();
        assert!(fs::read_to_string(&path).unwrap().starts_with("# Generated by NetworkManager"));
    }

    #[test]
    fn a_program_that_keeps_writing_is_named_and_its_servers_count_meanwhile() {
        let (_dir, path) = folder(THEIRS);
        let mut direct = Direct::new(&path);
        direct.set(&dns()).unwrap();
        for round in 1..=20 {
            fs::write(&path, format!("# Generated by NetworkManager\nnameserver 192.0.2.{round}\n")).unwrap();
            direct.repair(&dns()).unwrap();
            assert_eq!(direct.base_resolvers(), server(&format!("192.0.2.{round}")));
            // As if the pause was over.
            if direct.due().is_some() {
                direct.set(&dns()).unwrap();
            }
            assert!(direct.look().unwrap().is_ours);
        }
        let complaint = direct.complaint().unwrap();
        assert!(complaint.contains("Generated by NetworkManager"), "{complaint}");
        direct.revert().unwrap();
        assert!(direct.complaint().is_none());
    }
}
