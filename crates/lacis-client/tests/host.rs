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
            guard: true,
        },
        firewall: Firewall {
            mode: Mode::On,
            routed: nets(&["10.9.0.0/24", "2001:db8:9::/64"]),
            masquerade: true,
            stateful: true,
            keep_marks: true,
            ports: vec![41641],
            guard: Some(nets(&["10.9.0.0/24", "2001:db8:9::/64"])),
            ..Firewall::default()
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
        "link set lacis0 mtu 1280 up",
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
    let tables = [
        "ip route show table 52",
        "ip -6 route show table 52",
        "ip route show table 5252",
        "ip -6 route show table 5252",
    ];
    let routes = tables.map(table);
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
    assert_eq!(host.repair().await.expect("repaired").changes, 0);
    let set_up = everything();
    done("nft flush ruleset");
    done("ip route del throw 10.9.0.0/24 table 52");
    assert_eq!(host.repair().await.expect("repaired").changes, 2);
    assert_eq!(everything(), set_up);
    done("nft add rule inet lacis hook-input accept");
    assert_eq!(host.repair().await.expect("repaired").changes, 1);
    assert_eq!(everything(), set_up);

    host.revert().await;
    assert_eq!(everything(), before);
    assert_eq!(valid_mark().trim(), "0");
}

#[tokio::test]
async fn what_a_killed_daemon_has_left_stays_until_the_next_one_knows_what_is_wanted() {
    if outside("what_a_killed_daemon_has_left_stays_until_the_next_one_knows_what_is_wanted") {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    device();
    let before = everything();
    let valid_mark =
        || std::fs::read_to_string(setting("net.ipv4.conf.all.src_valid_mark")).expect("a setting");
    let leave = async || {
        let mut killed = host(dir.path()).await;
        killed.apply(&wish()).await.expect("it is set up");
        drop(killed);
        done("ip link del lacis0");
    };
    leave().await;
    let mut next = host(dir.path()).await;
    assert!(!reaches("198.51.100.1") && !reaches("2001:db8:7::1") && everything().contains("jump guard"));
    device();
    let plain = HostState { routes: Routes::default(), firewall: Firewall::default(), ..wish() };
    next.apply(&plain).await.expect("it is set up");
    assert_eq!(run("ip route show table 52").1.lines().filter(|line| !line.starts_with("Error")).count(), 0);
    assert!(!everything().contains("lacis"), "{}", everything());
    assert_eq!(valid_mark().trim(), "0");
    next.revert().await;
    assert_eq!(everything(), before);

    // With another state directory, and nothing wanted at all.
    leave().await;
    assert_eq!(valid_mark().trim(), "1");
    let other = tempfile::tempdir().expect("a folder");
    host(other.path()).await.revert().await;
    assert_eq!(everything(), before);
    assert_eq!(valid_mark().trim(), "0");
}

/// A way out beside the mesh.
fn uplink() {
    for line in [
        "link add eth0 type veth peer name router",
        "link set router up",
        "link set eth0 up",
        "address add 192.168.1.2/24 dev eth0",
        "address add 2001:db8:1::2/64 dev eth0 nodad",
        "route add default via 192.168.1.1",
        "-6 route add default via 2001:db8:1::1",
    ] {
        done(&format!("ip {line}"));
    }
}

/// Does a packet to there leave by the ordinary way, as far as routes say?
fn reaches(ip: &str) -> bool {
    run(&format!("ip route get {ip}")).1.contains("dev eth0")
}

#[tokio::test]
async fn with_an_exit_node_no_single_sweep_opens_a_way_beside_it() {
    if outside("with_an_exit_node_no_single_sweep_opens_a_way_beside_it") {
        return;
    }
    device();
    uplink();
    let dir = tempfile::tempdir().expect("a folder");
    let mut host = host(dir.path()).await;
    // The routes alone must do: this host has no firewall of ours.
    let wish = HostState { firewall: Firewall::default(), ..wish() };
    host.apply(&wish).await.expect("it is set up");
    let set_up = everything();
    for sweep in [
        "ip -4 rule del pref 5270; ip -6 rule del pref 5270",
        "ip -4 rule del pref 5280; ip -6 rule del pref 5280",
        "ip -4 route flush table 52; ip -6 route flush table 52",
        "ip -4 route flush table 5252; ip -6 route flush table 5252",
        "ip link set lacis0 down",
        "ip link set lacis0 mtu 600",
    ] {
        let mtu = "ip link set lacis0 mtu 1280";
        sweep.split("; ").for_each(|line| drop(done(line)));
        for ip in ["198.51.100.1", "2001:db8:7::1"] {
            assert!(!reaches(ip), "{ip} after {sweep}");
        }
        for (ip, family) in [("10.9.0.7", "-4"), ("2001:db8:9::7", "-6")] {
            assert!(reaches(ip), "{ip} is thrown, after {sweep}");
            let marked = format!("ip {family} route get {ip} mark 0x80000");
            assert!(done(&marked).contains("dev eth0"), "{sweep}");
        }
        done(mtu);
        host.repair().await.expect("repaired");
        assert_eq!(everything(), set_up, "{sweep}");
    }
    host.revert().await;
    assert!(reaches("198.51.100.1") && reaches("2001:db8:7::1"));
}

#[tokio::test]
async fn rules_that_take_the_meshs_packets_are_passed_and_named() {
    if outside("rules_that_take_the_meshs_packets_are_passed_and_named") {
        return;
    }
    device();
    uplink();
    done("ip tuntap add wg0 mode tun");
    done("ip address add 10.99.0.2/32 dev wg0");
    done("ip link set wg0 up");
    let dir = tempfile::tempdir().expect("a folder");
    let mut host = host(dir.path()).await;
    let wish = HostState {
        routes: Routes { device: nets(&["100.64.0.2/32", "fd7a:115c:a1e0::2/128"]), ..Routes::default() },
        firewall: Firewall::default(),
        ..wish()
    };
    host.apply(&wish).await.expect("it is set up");
    let set_up = everything();
    let to = |line: &str| {
        let said = done(&format!("ip route get {line}"));
        said.split(" dev ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or("nothing").to_owned()
    };
    let sound = || {
        assert_eq!(to("100.64.0.2"), "lacis0");
        assert_eq!(to("fd7a:115c:a1e0::2"), "lacis0");
        assert_eq!(to("198.51.100.1 mark 0x80000"), "eth0");
        assert_eq!(to("2001:db8:7::1 mark 0x80000"), "eth0");
    };
    sound();
    // As wg-quick does it with 0.0.0.0/0.
    let full_tunnel = |what: &str| {
        for family in ["-4", "-6"] {
            done(&format!("ip {family} rule {what} not fwmark 51820 table 51820"));
            done(&format!("ip {family} rule {what} table main suppress_prefixlength 0"));
        }
    };
    full_tunnel("add");
    done("ip -4 route add default dev wg0 table 51820");
    done("ip -6 route add default dev wg0 table 51820");
    assert_eq!(to("100.64.0.2"), "wg0");
    let report = host.repair().await.expect("repaired");
    sound();
    assert_eq!(to("198.51.100.1"), "wg0", "what is theirs stays theirs");
    assert_eq!(to("198.51.100.1 mark 51820"), "eth0");
    let named = |missing: &[String]| missing.iter().any(|line| line.contains("fwmark 0xca6c lookup 51820"));
    assert!(named(&report.missing), "{:?}", report.missing);
    let report = host.repair().await.expect("repaired");
    assert!(report.changes == 0 && named(&report.missing), "{report:?}");
    // With an exit node of ours nothing is left to them.
    let exit = HostState { routes: self::wish().routes, ..wish.clone() };
    host.apply(&exit).await.expect("it is set up");
    assert_eq!(to("198.51.100.1"), "lacis0");
    host.apply(&wish).await.expect("it is set up");
    full_tunnel("del");
    let report = host.repair().await.expect("repaired");
    assert_eq!(report.missing, Vec::<String>::new());
    assert_eq!(everything(), set_up);

    // What selects other packets, or means just ours, is left where it is.
    for harmless in [
        "from 192.168.1.2 lookup 51820",
        "iif eth0 lookup 51820",
        "fwmark 0x80000/0xff0000 lookup 51820",
        "fwmark 0x200/0xf00 lookup 51820",
        "to 203.0.113.0/24 lookup 51820",
        "lookup 220",
    ] {
        done(&format!("ip rule add pref 100 {harmless}"));
        let report = host.repair().await.expect("repaired");
        assert!(report.missing.is_empty() && report.changes == 0, "{harmless}: {report:?}");
        done(&format!("ip rule del pref 100 {harmless}"));
    }
    for harmful in ["to 100.64.0.0/10 lookup main", "unreachable", "from 100.64.0.0/10 lookup 51820"] {
        done(&format!("ip rule add pref 100 {harmful}"));
        let report = host.repair().await.expect("repaired");
        assert!(report.missing.iter().any(|line| line.contains(harmful)), "{harmful}: {report:?}");
        sound();
        done(&format!("ip rule del pref 100 {harmful}"));
        host.repair().await.expect("repaired");
        assert_eq!(everything(), set_up);
    }
    // Nor is there a place between ours.
    done("ip rule add pref 5260 to 100.64.0.0/10 lookup main");
    host.repair().await.expect("repaired");
    sound();
    done("ip rule del pref 5260");
    host.repair().await.expect("repaired");
    assert_eq!(everything(), set_up);
    // There is no place before the first.
    done("ip rule add pref 3 to 100.64.0.0/10 lookup main");
    let report = host.repair().await.expect("repaired");
    assert!(report.missing.iter().any(|line| line.contains("priority above 5")), "{report:?}");
    done("ip rule del pref 3");
    host.repair().await.expect("repaired");
    host.revert().await;
}

#[tokio::test]
async fn what_was_taken_from_the_device_is_named_and_put_back_when_that_is_possible() {
    if outside("what_was_taken_from_the_device_is_named_and_put_back_when_that_is_possible") {
        return;
    }
    device();
    let dir = tempfile::tempdir().expect("a folder");
    let mut host = host(dir.path()).await;
    let state = HostState { firewall: Firewall::default(), ..wish() };
    host.apply(&state).await.expect("it is set up");
    let set_up = everything();
    let index = std::fs::read_to_string("/sys/class/net/lacis0/ifindex");
    let index =
        index.unwrap_or_else(|_| done("ip -o link show lacis0").split(':').next().expect("a number").into());
    let changed = host.watch(index.trim().parse().expect("a number"));
    let noticed = async || {
        let wait = tokio::time::timeout(std::time::Duration::from_secs(5), changed.notified());
        wait.await.expect("it is noticed");
    };
    // From the first time on.
    noticed().await;
    let set_mtu = |mtu: u32| drop(done(&format!("ip link set lacis0 mtu {mtu}")));
    let rename = |from: &str, to: &str| drop(done(&format!("ip link set {from} down name {to} up")));
    let switch = |value: &str| set("net.ipv6.conf.lacis0.disable_ipv6", value);
    type Act<'a> = &'a dyn Fn();
    let cases: [(Act<'_>, &str, Act<'_>); 4] = [
        (&|| switch("1"), "net.ipv6.conf.lacis0.disable_ipv6=0", &|| switch("0")),
        (&|| set_mtu(600), "too little for IPv6", &|| set_mtu(1280)),
        (&|| set_mtu(9000), "ip link set lacis0 mtu 1280", &|| set_mtu(1280)),
        (&|| rename("lacis0", "other0"), "ip link set other0 name lacis0", &|| rename("other0", "lacis0")),
    ];
    for (take, words, give) in cases {
        take();
        noticed().await;
        let said = match host.repair().await {
            Ok(report) => report.missing.join("\n"),
            Err(error) => error.to_string(),
        };
        assert!(said.contains(words), "{words}: {said}");
        give();
        let report = host.repair().await.expect("repaired");
        assert_eq!(report.missing, Vec::<String>::new());
        assert_eq!(everything(), set_up, "{words}");
    }
    done("ip address flush dev lacis0");
    done("ip -6 address flush dev lacis0 scope global");
    host.repair().await.expect("repaired");
    let addresses = done("ip address show dev lacis0");
    assert!(
        addresses.contains("100.64.0.1/32") && addresses.contains("fd7a:115c:a1e0::1/128"),
        "{addresses}"
    );
    host.revert().await;
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
    let report = host.repair().await.expect("repaired");
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
    assert!(v6.contains("unreachable default") && !v6.contains("lacis0"), "{v6}");
    assert!(!run("ip -6 route get 2001:db8:7::1").0);
    assert_eq!(host.apply(&wish()).await.expect("again").changes, 0);
    set("net.ipv6.conf.lacis0.disable_ipv6", "0");
    host.apply(&wish()).await.expect("it is set up");
    let v6 = done("ip -6 route show table 52");
    assert!(v6.contains("default dev lacis0"), "{v6}");
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
    let warnings = host.repair().await.expect("repaired").warnings;
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
