//! What this host is, as peers and administrators see it: read once at the start.

use lacis_wire::control::Hostinfo;
use lacis_wire::local::Prefs;

/// The version that peers see.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");
/// A name for hosts that have none.
const NAMELESS: &str = "localhost";

/// The host's own facts, without what the user wishes.
pub(crate) fn read(log_id: &str) -> Hostinfo {
    let uname = rustix::system::uname();
    let text = |part: &std::ffi::CStr| part.to_string_lossy().into_owned();
    let release = std::fs::read_to_string("/etc/os-release")
        .or_else(|_| std::fs::read_to_string("/usr/lib/os-release"))
        .unwrap_or_default();
    Hostinfo {
        ipn_version: VERSION.to_owned(),
        backend_log_id: log_id.to_owned(),
        os: "linux".to_owned(),
        os_version: text(uname.release()),
        distro: os_release(&release, "ID"),
        distro_version: os_release(&release, "VERSION_ID"),
        distro_code_name: os_release(&release, "VERSION_CODENAME"),
        hostname: text(uname.nodename()),
        machine: text(uname.machine()),
        go_arch: go_arch(std::env::consts::ARCH).to_owned(),
        package: option_env!("LACIS_PACKAGE").unwrap_or_default().to_owned(),
        userspace: Some(false),
        userspace_router: Some(false),
        ..Hostinfo::default()
    }
}

/// The same with the user's wishes.
pub(crate) fn with_prefs(host: &Hostinfo, prefs: &Prefs) -> Hostinfo {
    let hostname = if prefs.hostname.is_empty() { &host.hostname } else { &prefs.hostname };
    Hostinfo {
        hostname: if hostname.is_empty() { NAMELESS.to_owned() } else { hostname.clone() },
        routable_ips: prefs.advertise_routes.clone(),
        request_tags: prefs.advertise_tags.clone(),
        shields_up: prefs.shields_up,
        ..host.clone()
    }
}

/// Go's name of an architecture, which is what the field has.
fn go_arch(rust: &str) -> &str {
    match rust {
        "x86_64" => "amd64",
        "x86" => "386",
        "aarch64" => "arm64",
        other => other,
    }
}

fn os_release(text: &str, key: &str) -> String {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
        .map(|value| value.trim_matches(['"', '\'']).to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn os_release_values_lose_their_quotes_and_keys_match_whole() {
        let text = "ID_LIKE=x\nID=debian\nVERSION_ID=\"12\"\n";
        assert_eq!(os_release(text, "ID"), "debian");
        assert_eq!(os_release(text, "VERSION_ID"), "12");
        assert_eq!(os_release(text, "VERSION_CODENAME"), "");
    }

    #[test]
    fn the_users_name_for_the_host_wins() {
        let host = Hostinfo { hostname: "machine".into(), ..Hostinfo::default() };
        assert_eq!(with_prefs(&host, &Prefs::default()).hostname, "machine");
        let prefs = Prefs { hostname: "bob".into(), ..Prefs::default() };
        assert_eq!(with_prefs(&host, &prefs).hostname, "bob");
        assert_eq!(with_prefs(&Hostinfo::default(), &Prefs::default()).hostname, NAMELESS);
    }
}
