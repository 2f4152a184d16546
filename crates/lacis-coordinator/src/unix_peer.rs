//! Who is at the other end of the admin socket, as the kernel says.
#![allow(unsafe_code)] // one system call that no safe wrapper has

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};

use tokio::net::UnixStream;

/// Members of this group may administrate.
pub(crate) const GROUP: &str = "lacis";
/// A user in more groups than this is looked at with the first of them only.
const MAX_GROUPS: usize = 1024;

/// The gid of a group by `/etc/group`, without the name service: a lookup there could hang.
pub(crate) fn group_id(name: &str) -> Option<u32> {
    let text = std::fs::read_to_string("/etc/group").ok()?;
    find_group(&text, name)
}

fn find_group(text: &str, name: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
    })
}

/// Whether a peer may administrate: root, the user that the coordinator runs as, or a member of the group.
pub(crate) fn may_administrate(stream: &UnixStream, group: Option<u32>) -> io::Result<bool> {
    let peer = stream.peer_cred()?;
    let own = rustix::process::geteuid().as_raw();
    if peer.uid() == 0 || peer.uid() == own {
        return Ok(true);
    }
    let Some(group) = group else { return Ok(false) };
    Ok(peer.gid() == group || supplementary_groups(stream)?.contains(&group))
}

/// The peer's other groups at the time it connected (`SO_PEERGROUPS`).
fn supplementary_groups(stream: &UnixStream) -> io::Result<Vec<u32>> {
    let mut groups = vec![0_u32; MAX_GROUPS];
    let mut length = (groups.len() * size_of::<u32>()) as libc::socklen_t;
    // SAFETY: the descriptor is open as long as `stream` is borrowed; `groups` has `length` writable bytes,
    // and any bytes that the kernel puts there are valid `u32`s.
    let result = unsafe {
        libc::getsockopt(
            stream.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    groups.truncate(length as usize / size_of::<u32>());
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_found_by_their_whole_name() {
        let text = "root:x:0:\nlacis-x:x:7:\nlacis:x:994:alice,bob\nbroken\n";
        assert_eq!(find_group(text, "lacis"), Some(994));
        assert_eq!(find_group(text, "laci"), None);
        assert_eq!(find_group(text, "broken"), None);
    }

    #[tokio::test]
    async fn the_own_user_may_administrate_and_its_groups_can_be_read() {
        let (one, _two) = UnixStream::pair().unwrap();
        assert!(may_administrate(&one, None).unwrap());
        supplementary_groups(&one).unwrap();
    }
}
