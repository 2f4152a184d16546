//! `/etc/resolv.conf` written by ourselves, where no other program owns it. The file that was there is kept in the
//! state directory and put back, after a crash at the next start.
//!
//! Under systemd this file is all that the daemon may write in `/etc` (`ReadWritePaths=` in its unit, which mounts the
//! file on itself): then it is not replaced but written in place, and a link is followed. When another program replaces
//! the file, the mount is gone with it, and so is the right to write, until the unit is started again.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use lacis_dns::{OsDns, QUAD100_V4, QUAD100_V6};

use super::resolver::ResolverError;

/// By this line we know our own file again.
const MARKER: &str = "# Written by lacisd. The file that was here before is put back when it stops.";
const BACKUP: &str = "resolv.conf.before";
/// Where the file was a link, a link with the same target.
const LINK: &str = "resolv.conf.link-before";
const MODE: u32 = 0o644;
const DNS_PORT: u16 = 53;
/// The C library reads no more.
const MOST_SERVERS: usize = 3;
/// What to do when the daemon may not write the file.
const READ_ONLY: &str = "the service may write only the file that was there when it was started: `systemctl restart lacisd` after another program has replaced it, or let systemd-resolved or resolvconf manage it";
/// Another program that insists is left alone after so many times.
const MOST_REPAIRS: u32 = 10;

#[derive(Debug)]
pub(super) struct Direct {
    path: PathBuf,
    backup: PathBuf,
    link: PathBuf,
    repairs: u32,
}

impl Direct {
    pub(super) fn new(path: &Path, state_dir: &Path) -> Self {
        let (backup, link) = (state_dir.join(BACKUP), state_dir.join(LINK));
        Self { path: path.to_owned(), backup, link, repairs: 0 }
    }

    fn is_ours(&self) -> bool {
        fs::read_to_string(&self.path).is_ok_and(|text| text.starts_with(MARKER))
    }

    /// Puts back what a daemon that crashed left.
    pub(super) fn recover(&self) {
        if self.is_ours() {
            tracing::info!("resolv.conf is put back: an earlier lacisd could not");
            if let Err(error) = self.revert() {
                tracing::warn!(%error, "resolv.conf is not as it was");
            }
        }
    }

    pub(super) fn set(&mut self, dns: &OsDns) -> Result<(), ResolverError> {
        if !self.is_ours() {
            let failed =
                |source| ResolverError::File { doing: format!("keeping {}", self.path.display()), source };
            remove(&self.link).map_err(failed)?;
            if let Ok(target) = fs::read_link(&self.path) {
                symlink(target, &self.link).map_err(failed)?;
            }
            match fs::read(&self.path) {
                Ok(text) => fs::write(&self.backup, text).map_err(failed)?,
                // There was none: reverting removes ours.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    remove(&self.backup).map_err(failed)?;
                }
                Err(error) => return Err(failed(error)),
            }
        }
        self.write(self.text(dns).as_bytes())
    }

    /// The host cannot tell names apart: all go to the first servers, and from there on.
    fn text(&self, dns: &OsDns) -> String {
        let base = fs::read_to_string(&self.backup).unwrap_or_default();
        let base = resolv_conf::Config::parse(&base).ok();
        let mut text = format!("{MARKER}\n");
        for server in dns.servers.iter().take(MOST_SERVERS) {
            let _ = writeln!(text, "nameserver {server}");
        }
        let mut search = dns.search.clone();
        if let Some(own) =
            base.as_ref().and_then(|base| base.get_last_search_or_domain().next().map(|_| base))
        {
            for domain in own.get_last_search_or_domain() {
                if !search.iter().any(|known| known == domain) {
                    search.push(domain.to_owned());
                }
            }
        }
        if !search.is_empty() {
            let _ = writeln!(text, "search {}", search.join(" "));
        }
        text
    }

    pub(super) fn revert(&self) -> Result<(), ResolverError> {
        if !self.is_ours() {
            return Ok(());
        }
        let failed = |doing: &str, path: &Path| {
            let doing = format!("{doing} {}", path.display());
            move |source| ResolverError::File { doing, source }
        };
        let was_link = fs::read_link(&self.link).is_ok_and(|target| self.relink(&target).is_ok());
        if !was_link {
            match fs::read(&self.backup) {
                Ok(text) => self.write(&text)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    remove(&self.path).map_err(failed("removing", &self.path))?;
                }
                Err(error) => return Err(failed("reading", &self.backup)(error)),
            }
        }
        remove(&self.link).map_err(failed("removing", &self.link))?;
        remove(&self.backup).map_err(failed("removing", &self.backup))
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

    pub(super) fn repair(&mut self, dns: &OsDns) -> Result<(), ResolverError> {
        if self.is_ours() || self.repairs >= MOST_REPAIRS {
            return Ok(());
        }
        self.repairs += 1;
        tracing::warn!(path = %self.path.display(), "another program has written over resolv.conf; writing it again");
        self.set(dns)
    }

    /// Whole and at once; in place where the file is a mount of its own, as in containers and under systemd.
    fn write(&self, text: &[u8]) -> Result<(), ResolverError> {
        let new = self.new_file();
        let replaced = fs::write(&new, text)
            .and_then(|()| fs::set_permissions(&new, fs::Permissions::from_mode(MODE)))
            .and_then(|()| fs::rename(&new, &self.path));
        let written = replaced.or_else(|_| {
            // What is left of the first way.
            let _ = fs::remove_file(&new);
            write_in_place(&self.path, text)
        });
        written.map_err(|source| {
            let path = self.path.display();
            let doing = match source.kind() {
                io::ErrorKind::ReadOnlyFilesystem => format!("writing {path} ({READ_ONLY})"),
                _ => format!("writing {path}"),
            };
            ResolverError::File { doing, source }
        })
    }

    /// The servers of the file that was there before.
    pub(super) fn base_resolvers(&self) -> Vec<SocketAddr> {
        let path = if self.is_ours() { &self.backup } else { &self.path };
        let text = fs::read_to_string(path).unwrap_or_default();
        let servers = resolv_conf::Config::parse(&text).map(|config| config.nameservers).unwrap_or_default();
        let own = |ip: &IpAddr| *ip == IpAddr::V4(QUAD100_V4) || *ip == IpAddr::V6(QUAD100_V6);
        servers
            .into_iter()
            .map(IpAddr::from)
            .filter(|ip| !own(ip))
            .map(|ip| SocketAddr::new(ip, DNS_PORT))
            .collect()
    }
}

/// The new text over the old one, which is cut only then: whoever reads meanwhile never finds an empty file.
fn write_in_place(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(false).mode(MODE).open(path)?;
    file.write_all(text)?;
    file.set_len(text.len() as u64)
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

    fn dns() -> OsDns {
        OsDns {
            servers: vec![QUAD100_V4.into()],
            search: vec!["lab.example".into()],
            match_domains: vec!["lab.example".into()],
        }
    }

    #[test]
    fn the_file_is_replaced_and_put_back_even_after_a_crash() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let before = "# mine\nnameserver 192.0.2.1\nsearch home.example\n";
        fs::write(&path, before).unwrap();
        let mut direct = Direct::new(&path, dir.path());
        direct.set(&dns()).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("nameserver 100.100.100.100\nsearch lab.example home.example\n"), "{text}");
        assert_eq!(direct.base_resolvers(), ["192.0.2.1:53".parse().unwrap()]);
        direct.set(&dns()).unwrap();
        // Here it crashes, and another one starts.
        let again = Direct::new(&path, dir.path());
        again.recover();
        assert_eq!(fs::read_to_string(&path).unwrap(), before);
        assert_eq!(again.base_resolvers(), ["192.0.2.1:53".parse().unwrap()]);
        again.revert().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), before, "reverting twice does nothing");
    }

    #[test]
    fn where_there_was_no_file_there_is_none_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let mut direct = Direct::new(&path, dir.path());
        direct.set(&dns()).unwrap();
        assert!(path.exists());
        direct.revert().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_link_is_a_link_again_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let (path, target) = (dir.path().join("resolv.conf"), dir.path().join("theirs"));
        fs::write(&target, "nameserver 192.0.2.1\n").unwrap();
        symlink("theirs", &path).unwrap();
        let mut direct = Direct::new(&path, dir.path());
        direct.set(&dns()).unwrap();
        assert!(direct.is_ours());
        assert_eq!(fs::read_to_string(&target).unwrap(), "nameserver 192.0.2.1\n", "theirs is not written");
        assert_eq!(direct.base_resolvers(), ["192.0.2.1:53".parse().unwrap()]);
        direct.revert().unwrap();
        assert_eq!(fs::read_link(&path).unwrap(), Path::new("theirs"));
        assert!(!direct.link.exists() && !direct.backup.exists());
    }

    /// A place where no file can be made beside `resolv.conf`, so that it cannot be replaced.
    fn without_replacing(dir: &Path) -> Direct {
        let direct = Direct::new(&dir.join("resolv.conf"), dir);
        fs::create_dir_all(direct.new_file().join("in-the-way")).unwrap();
        direct
    }

    #[test]
    fn a_file_that_cannot_be_replaced_is_written_in_place_and_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let before = format!("# {}\nnameserver 192.0.2.1\n", "mine ".repeat(100));
        fs::write(&path, &before).unwrap();
        let mut direct = without_replacing(dir.path());
        let open = fs::File::open(&path).unwrap();
        direct.set(&dns()).unwrap();
        let text = io::read_to_string(&open).unwrap();
        assert!(text.starts_with(MARKER) && text.ends_with("search lab.example\n"), "{text}");
        assert_eq!(direct.base_resolvers(), ["192.0.2.1:53".parse().unwrap()]);
        Direct::new(&path, dir.path()).recover();
        assert_eq!(fs::read_to_string(&path).unwrap(), before);
    }

    #[test]
    fn a_link_that_cannot_be_replaced_is_followed_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (path, target) = (dir.path().join("resolv.conf"), dir.path().join("theirs"));
        fs::write(&target, "nameserver 192.0.2.1\n").unwrap();
        symlink("theirs", &path).unwrap();
        let mut direct = without_replacing(dir.path());
        direct.set(&dns()).unwrap();
        assert!(fs::read_to_string(&target).unwrap().starts_with(MARKER));
        direct.revert().unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "nameserver 192.0.2.1\n");
        assert_eq!(fs::read_link(&path).unwrap(), Path::new("theirs"));
    }

    #[test]
    fn what_another_program_wrote_is_kept_and_ours_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let mut direct = Direct::new(&path, dir.path());
        direct.set(&dns()).unwrap();
        fs::write(&path, "nameserver 192.0.2.7\n").unwrap();
        direct.repair(&dns()).unwrap();
        assert!(direct.is_ours());
        assert_eq!(direct.base_resolvers(), ["192.0.2.7:53".parse().unwrap()]);
    }
}
