//! The host's side against a real kernel: routes, rules and firewall tables in a network namespace of their own, which
//! `unshare` makes by running this program once more.

use std::process::Command;

use ipnet::IpNet;
use lacis_client::host::{Firewall, Host, HostOptions, HostState, Mode, Routes};

/// Set in the copy that runs inside the namespace.
const INSIDE: &str = "LACIS_TEST_INSIDE";

fn run(line: &str) -> (bool, String) {
    let words: Vec<&str> = line.split_whitespace().collect();
    match Command::new(words[0]).args(&words[1..]).output() {
        Ok(output) => {
            let text = [output.stdout, output.stderr].concat();
            (output.status.success(), String::from_utf8_lossy(&text).into_owned())
        }
        Err(error) => (false, error.to_string()),
    }
}

fn setting(name: &str) -> String {
    format!("/proc/sys/{}", name.replace('.', "/"))
}

fn set(name: &str, value: &str) {
    std::fs::write(setting(name), value).expect(name);
}

fn done(line: &str) -> String {
    let (ok, text) = run(line);
    assert!(ok, "{line}: {text}");
    text
}

/// Runs the test of this name inside a namespace; false where that is not allowed, or is already so.
fn outside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return false;
    }
    for needed in ["unshare --net --mount --map-root-user true", "ip -V", "nft --version"] {
        if !run(needed).0 {
            eprintln!("skipped: `{needed}` does not work here");
            return true;
        }
    }
    let program = std::env::current_exe().expect("this program has a path");
    let output = Command::new("unshare")
        .args(["--net", "--mount", "--map-root-user"])
        .arg(program)
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("unshare");
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&text));
    true
}

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().expect(text)).collect()
}

/// A router that uses an exit node as well, so that everything is there at once.
fn wish() -> HostState {
    HostState {
        addresses: nets(&["100.64.0.1/32", "fd7a:115c:a1e0::1/128"]),
        routes: Routes {
            device: nets(&["100.64.0.2/32", "0.0.0.0/0", "::/0"]),
            thrown: nets(&["10.9.0.0/24", "2001:db8:9::/64"]),
        },
        firewall: Firewall {
            mode: Mode::On,
            routed: nets(&["10.9.0.0/24", "2001:db8:9::/64"]),
            masquerade: true,
            stateful: true,
            keep_marks: true,
            ports: vec![41641],
        },
        dns: None,
    }
}

async fn host(dir: &std::path::Path) -> Host {
    let options = HostOptions { resolv_conf: dir.join("resolv.conf"), ..HostOptions::default() };
    Host::new(options).await.expect("netlink")
}

fn device() {
    for line in [
        "link set lo up",
        "link add lacis0 type veth peer name other",
        "link set other up",
        "link set lacis0 up",
    ] {
        done(&format!("ip {line}"));
    }
}

fn everything() -> String {
    // A table that was never used is an error to `ip`, an empty one is nothing.
    let table = |line: &str| {
        let text = run(line).1;
        text.lines()
            .filter(|line| !line.starts_with("Error") && !line.starts_with("Dump"))
            .collect::<String>()
    };
    let routes = ["ip route show table 52", "ip -6 route show table 52"].map(table);
    let rest = ["ip rule", "ip -6 rule", "nft list ruleset"].map(done);
    [routes.as_slice(), rest.as_slice()].concat().join("--\n")
}

#[tokio::test]
async fn the_host_is_set_up_once_repaired_and_put_back() {
    if outside("the_host_is_set_up_once_repaired_and_put_back") {
        return;
    }
    device();
    let before = everything();
    let dir = tempfile::tempdir().expect("a folder");
    let mut host = host(dir.path()).await;

    let report = host.apply(&wish()).await.expect("it is set up");
    assert_eq!(report.warnings, Vec::<String>::new());
    let v4 = done("ip route show table 52");
    assert!(v4.contains("default dev lacis0") && v4.contains("throw 10.9.0.0/24"), "{v4}");
    let v6 = done("ip -6 route show table 52");
    assert!(v6.contains("default dev lacis0") && v6.contains("throw 2001:db8:9::/64"), "{v6}");
    let filter = done("nft list table inet lacis");
    for rule in [
        "jump input",
        "fib saddr . mark oifname \"lacis0\" drop",
        "ct state != { established, related } drop",
    ] {
        assert!(filter.contains(rule), "{rule}: {filter}");
    }
    assert!(done("nft list table ip lacis").contains("masquerade"));
    assert!(done("nft list table ip6 lacis").contains("masquerade"));
    let valid_mark =
        || std::fs::read_to_string(setting("net.ipv4.conf.all.src_valid_mark")).expect("a setting");
    assert_eq!(valid_mark().trim(), "1");

    assert_eq!(host.apply(&wish()).await.expect("again").changes, 0);
    assert_eq!(host.repair().await.changes, 0);
    let set_up = everything();
    done("nft flush ruleset");
    done("ip route del throw 10.9.0.0/24 table 52");
    assert_eq!(host.repair().await.changes, 2);
    assert_eq!(everything(), set_up);
    done("nft add rule inet lacis hook-input accept");
    assert_eq!(host.repair().await.changes, 1);
    assert_eq!(everything(), set_up);

    host.revert().await;
    assert_eq!(everything(), before);
    assert_eq!(valid_mark().trim(), "0");
}

#[tokio::test]
async fn what_a_crash_has_left_is_cleared_away() {
    if outside("what_a_crash_has_left_is_cleared_away") {
        return;
    }
    device();
    let dir = tempfile::tempdir().expect("a folder");
    let mut crashed = host(dir.path()).await;
    crashed.apply(&wish()).await.expect("it is set up");
    drop(crashed);

    let mut next = host(dir.path()).await;
    assert!(!everything().contains("table inet lacis"));
    let plain = HostState { routes: Routes::default(), firewall: Firewall::default(), ..wish() };
    next.apply(&plain).await.expect("it is set up");
    assert_eq!(done("ip route show table 52"), "");
    assert!(!everything().contains("lacis {"));
}

#[tokio::test]
async fn without_diverting_the_administrators_chains_stay() {
    if outside("without_diverting_the_administrators_chains_stay") {
        return;
    }
    device();
    let dir = tempfile::tempdir().expect("a folder");
    let mut host = host(dir.path()).await;
    let mut wish = wish();
    wish.firewall.mode = Mode::NoDivert;
    host.apply(&wish).await.expect("it is set up");
    let text = done("nft list table inet lacis");
    assert!(!text.contains("hook") && text.contains("chain forward"), "{text}");
    done("nft add chain inet lacis theirs { type filter hook input priority 5 ; }");
    done("nft add rule inet lacis theirs jump input");
    host.revert().await;
    let text = done("nft list table inet lacis");
    assert!(text.contains("jump input") && !text.contains("drop"), "{text}");
}

#[tokio::test]
async fn what_the_host_lacks_is_said() {
    if outside("what_the_host_lacks_is_said") {
        return;
    }
    device();
    set("net.ipv4.ip_forward", "0");
    set("net.ipv6.conf.all.forwarding", "1");
    done("nft add table ip filter");
    done("nft add chain ip filter FORWARD { type filter hook forward priority 0 ; policy drop ; }");
    let dir = tempfile::tempdir().expect("a folder");
    let mut host = host(dir.path()).await;
    let missing = host.apply(&wish()).await.expect("it is set up").missing;
    let said = |word: &str| missing.iter().any(|line| line.contains(word));
    assert!(said("sysctl -w net.ipv4.ip_forward=1") && !said("net.ipv6"), "{missing:?}");
    assert!(said("nft insert rule ip filter FORWARD iifname lacis0 accept"), "{missing:?}");

    set("net.ipv4.ip_forward", "1");
    done("nft insert rule ip filter FORWARD iifname lacis0 accept");
    let report = host.repair().await;
    assert_eq!(report.missing, Vec::<String>::new());
    host.revert().await;
}

#[tokio::test]
async fn ipv6_that_the_device_cannot_have_is_no_way_around_an_exit_node() {
    if outside("ipv6_that_the_device_cannot_have_is_no_way_around_an_exit_node") {
        return;
    }
    device();
    set("net.ipv6.conf.lacis0.disable_ipv6", "1");
    let before = everything();
    let dir = tempfile::tempdir().expect("a folder");
    let mut host = host(dir.path()).await;
    host.apply(&wish()).await.expect("it is set up");
    let v6 = done("ip -6 route show table 52");
    assert!(v6.contains("unreachable default"), "{v6}");
    assert!(!run("ip -6 route get 2001:db8:7::1").0);
    assert_eq!(host.apply(&wish()).await.expect("again").changes, 0);
    set("net.ipv6.conf.lacis0.disable_ipv6", "0");
    host.apply(&wish()).await.expect("it is set up");
    let v6 = done("ip -6 route show table 52");
    assert!(v6.contains("default dev lacis0") && !v6.contains("unreachable"), "{v6}");
    host.revert().await;
    assert_eq!(everything(), before);
}

/// As systemd makes it for the unit: a folder that is read-only but for one file.
#[tokio::test]
async fn in_a_read_only_etc_resolv_conf_is_written_in_place_while_that_is_allowed() {
    if outside("in_a_read_only_etc_resolv_conf_is_written_in_place_while_that_is_allowed") {
        return;
    }
    device();
    let dir = tempfile::tempdir().expect("a folder");
    let etc = dir.path().join("etc");
    std::fs::create_dir(&etc).expect("a folder");
    let file = etc.join("resolv.conf");
    let before = "nameserver 192.0.2.1\nsearch home.example\n";
    std::fs::write(&file, before).expect("a file");
    let (folder, path) = (etc.display().to_string(), file.display().to_string());
    done(&format!("mount --bind {folder} {folder}"));
    done(&format!("mount --bind {path} {path}"));
    done(&format!("mount -o remount,bind,ro {folder}"));
    assert!(std::fs::write(etc.join("passwd"), "").is_err());

    let options = HostOptions { resolv_conf: file.clone(), ..HostOptions::default() };
    let mut host = Host::new(options).await.expect("netlink");
    let dns = lacis_dns::OsDns {
        servers: vec![lacis_dns::QUAD100_V4.into()],
        search: vec!["lab.example".into()],
        match_domains: Vec::new(),
    };
    let wish = HostState { dns: Some(dns), ..wish() };
    let read = || std::fs::read_to_string(&file).expect("a file");
    assert_eq!(host.apply(&wish).await.expect("it is set up").warnings, Vec::<String>::new());
    assert!(read().contains("nameserver 100.100.100.100\nsearch lab.example home.example\n"), "{}", read());
    host.revert().await;
    assert_eq!(read(), before);
    host.apply(&wish).await.expect("it is set up");

    // Another program replaces the file, and the mount is gone.
    done(&format!("umount {path}"));
    done(&format!("mount -o remount,bind,rw {folder}"));
    std::fs::remove_file(&file).expect("a file");
    std::fs::write(&file, "nameserver 192.0.2.2\n").expect("a file");
    done(&format!("mount -o remount,bind,ro {folder}"));
    let warns = |warnings: &[String]| warnings.iter().any(|line| line.contains("systemctl restart lacisd"));
    let warnings = host.repair().await.warnings;
    assert!(warns(&warnings), "{warnings:?}");
    let warnings = host.apply(&wish).await.expect("the rest").warnings;
    assert!(warns(&warnings), "it is said as long as it is so: {warnings:?}");
    host.revert().await;
    assert_eq!(read(), "nameserver 192.0.2.2\n");
}

#[test]
fn the_unit_lets_the_daemon_write_its_own_files_only() {
    let unit = include_str!("../../../packaging/systemd/lacisd.service");
    let writable = unit.lines().filter_map(|line| line.strip_prefix("ReadWritePaths="));
    let mut writable: Vec<_> = writable.flat_map(str::split_whitespace).collect();
    writable.sort_unstable();
    let allowed = ["-/etc/resolv.conf", "-/proc/sys/net/ipv4/conf/all/src_valid_mark", "-/run/resolvconf"];
    assert_eq!(writable, allowed);
    assert!(unit.contains("\nProtectSystem=strict\n"));
}
