//! The rules that the daemon adds to the host's firewall, as text for `nft` (the client dossier, section 3).
//!
//! They are in tables of their own, so that neither side's reload takes away the other's: `inet lacis` to filter and to
//! mark, `ip lacis` and `ip6 lacis` to masquerade. That has a price: what another table drops stays dropped, whatever
//! is accepted here ([`super::forwarding`] tells the user of it). Each chain that does something (`input`) has a second
//! one with the hook that leads to it (`hook-input`), which is left out where the administrator wants to place the
//! jumps himself.

use std::fmt::Write as _;

use ipnet::IpNet;

/// Whose packets are nobody's but the mesh's.
const MESH_V4: &str = "100.64.0.0/10";
const MESH_V6: &str = "fd7a:115c:a1e0::/48";
/// Set on what the tunnel brought and this host passes on.
const FORWARDED: u32 = 0x4_0000;
/// Devices without a link layer: tunnels. What another VPN brings in is that one's business.
const TUNNEL_DEVICE: u32 = 65534;

/// How far the firewall is the daemon's business.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Not at all.
    #[default]
    Off,
    /// Chains are filled, and the administrator leads packets there.
    NoDivert,
    /// Packets are led through the chains.
    On,
}

/// What the firewall should do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Firewall {
    pub mode: Mode,
    /// Networks that this host routes for the mesh; the default routes when it is an exit node.
    pub routed: Vec<IpNet>,
    /// Hide the mesh's addresses from those networks.
    pub masquerade: bool,
    /// From those networks only answers come into the mesh.
    pub stateful: bool,
    /// Answers to the daemon's own packets get its mark, so that strict reverse-path filters let them pass although
    /// the mesh's routes lead elsewhere.
    pub keep_marks: bool,
    /// The tunnel's UDP ports.
    pub ports: Vec<u16>,
    /// An exit node is in use: nothing leaves by other devices, but to these networks.
    pub guard: Option<Vec<IpNet>>,
    /// Devices of other daemons of this kind, by which the guard lets packets leave.
    pub neighbours: Vec<String>,
    /// Bridges whose packets this host does not route, although it sees them pass.
    pub bridges: Vec<String>,
    /// Marks did not count in reverse-path filters before, and the daemon makes them count: see [`SET_VALID_MARK`].
    pub sets_valid_mark: bool,
}

impl Firewall {
    pub(super) fn routes(&self, v6: bool) -> bool {
        self.routed.iter().any(|net| matches!(net, IpNet::V6(_)) == v6)
    }

    /// Would something that the user wishes not work without these rules?
    pub(super) fn is_needed(&self) -> bool {
        self.mode != Mode::Off && (!self.routed.is_empty() || self.keep_marks)
    }

    /// Are marks of connections kept, so that they can count in reverse-path filters?
    pub(super) fn needs_valid_mark(&self) -> bool {
        self.mode != Mode::Off && self.keep_marks
    }
}

/// Names and marks that the rules are made with.
#[derive(Clone, Debug)]
pub(super) struct Names {
    /// The mesh's device.
    pub(super) device: String,
    /// Of all tables.
    pub(super) table: String,
    /// The mark of the daemon's own packets, and the bits of it that count.
    pub(super) fwmark: u32,
    pub(super) mask: u32,
}

impl Names {
    /// `None` for names of devices that rules cannot have: what has a meaning to `nft`.
    pub(super) fn new(device: &str, fwmark: u32, mask: u32) -> Option<Self> {
        is_plain(device).then(|| Self {
            table: if device == "lacis0" { "lacis".to_owned() } else { format!("lacis-{device}") },
            device: device.to_owned(),
            fwmark,
            mask,
        })
    }

    /// Sets our bits of a mark and leaves the others.
    fn marked(&self, what: &str, mark: u32) -> String {
        format!("{what} mark set {what} mark & {:#010x} | {mark:#010x}", !self.mask)
    }
}

/// Has a device a name that `nft` takes for nothing else?
fn is_plain(device: &str) -> bool {
    device.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

/// A chain without rules in `inet lacis`, by which a later start knows that the daemon has set `src_valid_mark`. It lives
/// as long as that does: neither survives a reboot.
pub(super) const SET_VALID_MARK: &str = "set-src-valid-mark";
/// A chain of `inet lacis` and how packets get there.
const CHAINS: [(&str, &str); 5] = [
    // After whatever may change a packet's route.
    ("guard", "type filter hook output priority filter"),
    ("input", "type filter hook input priority filter"),
    ("forward", "type filter hook forward priority filter"),
    // After connection tracking and before anybody's reverse-path filter.
    ("prerouting", "type filter hook prerouting priority -155"),
    ("output", "type filter hook output priority mangle"),
];
const POSTROUTING: (&str, &str) = ("postrouting", "type nat hook postrouting priority srcnat");

/// Names of all chains that are ours.
pub(super) fn is_ours(chain: &str) -> bool {
    let name = chain.strip_prefix("hook-").unwrap_or(chain);
    name == SET_VALID_MARK || CHAINS.iter().chain([&POSTROUTING]).any(|(ours, _)| *ours == name)
}

/// With an exit node: what may leave by another device than the mesh's. All else ends here.
fn guard(wish: &Firewall, names: &Names, networks: &[IpNet]) -> Vec<String> {
    let Names { device, fwmark, mask, .. } = names;
    let devices = ["lo", device].into_iter().chain(wish.neighbours.iter().map(String::as_str));
    let devices: Vec<String> =
        devices.filter(|name| is_plain(name)).map(|name| format!("\"{name}\"")).collect();
    let mut rules = vec![
        format!("oifname {{ {} }} return", devices.join(", ")),
        format!("meta mark & {mask:#010x} == {fwmark:#010x} return"),
    ];
    for (family, v6) in [("ip", false), ("ip6", true)] {
        let nets: Vec<String> = networks
            .iter()
            .filter(|net| matches!(net, IpNet::V6(_)) == v6)
            .map(ToString::to_string)
            .collect();
        if !nets.is_empty() {
            rules.push(format!("{family} daddr {{ {} }} return", nets.join(", ")));
        }
    }
    // What keeps the link itself alive and never leaves it: groups of the link, neighbours, leases.
    rules.extend(
        [
            "ip daddr 224.0.0.0/24 return",
            "fib daddr type broadcast return",
            "ip6 daddr { fe80::/10, ff02::/16 } return",
            "icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert } return",
            "udp sport 68 udp dport 67 return",
            "udp sport 546 udp dport 547 return",
            "drop",
        ]
        .map(str::to_owned),
    );
    rules
}

fn rules(chain: &str, wish: &Firewall, names: &Names) -> Vec<String> {
    let Names { device, fwmark, mask, .. } = names;
    let list = |v6: bool| {
        let nets: Vec<String> = wish
            .routed
            .iter()
            .filter(|net| matches!(net, IpNet::V6(_)) == v6 && net.prefix_len() != 0)
            .map(ToString::to_string)
            .collect();
        nets.join(", ")
    };
    let mut rules = Vec::new();
    match chain {
        "input" => {
            // Nobody outside is a node: the route back would lead into the tunnel.
            for range in [format!("ip saddr {MESH_V4}"), format!("ip6 saddr {MESH_V6}")] {
                rules.push(format!(
                    "iifname != {{ \"lo\", \"{device}\" }} iiftype != {TUNNEL_DEVICE} {range} fib saddr . mark oifname \"{device}\" drop"
                ));
            }
        }
        "forward" => {
            if !wish.routed.is_empty() {
                rules.push(format!("iifname \"{device}\" {}", names.marked("meta", FORWARDED)));
                rules.push(format!("iifname \"{device}\" accept"));
            }
            // Nor may a neighbour speak in a node's name, unless its network has such addresses and is routed.
            for (family, range, v6) in [("ip", MESH_V4, false), ("ip6", MESH_V6, true)] {
                let except = match list(v6) {
                    nets if nets.is_empty() => String::new(),
                    nets => format!(" {family} saddr != {{ {nets} }}"),
                };
                rules.push(format!("oifname \"{device}\" {family} saddr {range}{except} drop"));
            }
            if !wish.routed.is_empty() {
                if wish.stateful {
                    rules.push(format!("oifname \"{device}\" ct state != {{ established, related }} drop"));
                }
                // The tunnel is narrower than most networks, and not everybody tells a sender so.
                rules.push(format!(
                    "oifname \"{device}\" tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu"
                ));
            }
            if wish.guard.is_some() {
                let bridges = wish.bridges.iter().filter(|name| is_plain(name));
                rules.extend(bridges.map(|name| format!("iifname \"{name}\" oifname \"{name}\" return")));
                rules.push("jump guard".to_owned());
            }
        }
        "guard" => {
            rules.extend(wish.guard.iter().flat_map(|networks| guard(wish, names, networks)));
        }
        "prerouting" if wish.keep_marks => {
            let set = names.marked("meta", *fwmark);
            rules.push(format!("iifname != \"{device}\" ct mark & {mask:#010x} == {fwmark:#010x} {set}"));
            if !wish.ports.is_empty() {
                let ports = wish.ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
                rules.push(format!(
                    "iifname != \"{device}\" fib daddr type local udp dport {{ {ports} }} {set}"
                ));
            }
        }
        "output" if wish.keep_marks => {
            let set = names.marked("ct", *fwmark);
            rules.push(format!(
                "meta mark & {mask:#010x} == {fwmark:#010x} ct mark & {mask:#010x} != {fwmark:#010x} {set}"
            ));
        }
        "postrouting" => rules.push(format!(
            "oifname != \"{device}\" meta mark & {mask:#010x} == {FORWARDED:#010x} masquerade"
        )),
        _ => {}
    }
    rules
}

/// One chain with its hook, both from nothing; whatever else the table has stays.
fn chain(script: &mut String, table: &str, (name, hook): (&str, &str), mode: Mode, rules: &[String]) {
    // Writing to a string cannot fail.
    let _ = writeln!(script, "add chain {table} {name}\nflush chain {table} {name}");
    for rule in rules {
        let _ = writeln!(script, "add rule {table} {name} {rule}");
    }
    let _ = writeln!(
        script,
        "add chain {table} hook-{name} {{ {hook} ; policy accept ; }}\nflush chain {table} hook-{name}"
    );
    let _ = if mode == Mode::On && !rules.is_empty() {
        writeln!(script, "add rule {table} hook-{name} jump {name}")
    } else {
        // A hook costs something even if nothing hangs on it.
        writeln!(script, "delete chain {table} hook-{name}")
    };
}

/// The families in which a wish needs a table.
pub(super) fn tables(wish: &Firewall, with_nat6: bool) -> Vec<&'static str> {
    let mut families = vec!["inet"];
    if wish.masquerade && wish.routes(false) {
        families.push("ip");
    }
    if wish.masquerade && wish.routes(true) && with_nat6 {
        families.push("ip6");
    }
    families
}

/// One transaction that makes the firewall so, whatever there was of ours before.
pub(super) fn script(wish: &Firewall, names: &Names, with_nat6: bool) -> String {
    let mut script = String::new();
    let wanted = tables(wish, with_nat6);
    for family in ["inet", "ip", "ip6"] {
        let table = format!("{family} {}", names.table);
        let _ = writeln!(script, "add table {table}");
        if !wanted.contains(&family) {
            let _ = writeln!(script, "delete table {table}");
        } else if family == "inet" {
            let _ = writeln!(script, "add chain {table} {SET_VALID_MARK}");
            if !wish.sets_valid_mark {
                let _ = writeln!(script, "delete chain {table} {SET_VALID_MARK}");
            }
            for one in CHAINS {
                chain(&mut script, &table, one, wish.mode, &rules(one.0, wish, names));
            }
        } else {
            let masquerade = rules(POSTROUTING.0, wish, names);
            chain(&mut script, &table, POSTROUTING, wish.mode, &masquerade);
        }
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        Names::new("lacis0", 0x80000, 0xff_0000).unwrap()
    }

    fn router(routed: &[&str]) -> Firewall {
        Firewall {
            mode: Mode::On,
            routed: routed.iter().map(|net| net.parse().unwrap()).collect(),
            masquerade: true,
            ..Firewall::default()
        }
    }

    #[test]
    fn a_plain_node_is_guarded_and_tracks_no_connections() {
        let text = script(&Firewall { mode: Mode::On, ..Firewall::default() }, &names(), true);
        assert!(text.contains("hook-input jump input") && text.contains("hook-forward jump forward"));
        assert!(!text.contains(" ct ") && !text.contains("masquerade") && !text.contains("accept\n"));
        assert!(text.contains("delete chain inet lacis hook-prerouting"));
        assert!(text.contains("delete chain inet lacis hook-guard") && !text.contains("jump guard"));
        assert!(text.contains("delete table ip lacis\n") && text.contains("delete table ip6 lacis\n"));
    }

    #[test]
    fn a_router_forwards_and_masquerades_the_families_it_routes() {
        let text = script(&router(&["10.1.0.0/16"]), &names(), true);
        assert!(text.contains("add rule inet lacis forward iifname \"lacis0\" accept"));
        assert!(text.contains("ip saddr != { 10.1.0.0/16 } drop"));
        assert!(text.contains("add rule ip lacis postrouting") && !text.contains("add rule ip6 lacis"));
        let exit = script(&router(&["0.0.0.0/0", "::/0"]), &names(), true);
        assert!(exit.contains("add rule ip6 lacis postrouting") && !exit.contains("0.0.0.0/0"));
        let old_kernel = script(&router(&["0.0.0.0/0", "::/0"]), &names(), false);
        assert!(old_kernel.contains("add rule ip lacis postrouting") && !old_kernel.contains("add rule ip6"));
        let open = script(&Firewall { masquerade: false, ..router(&["10.1.0.0/16"]) }, &names(), true);
        assert!(!open.contains("masquerade"));
    }

    #[test]
    fn without_diverting_chains_are_filled_and_nothing_leads_there() {
        let wish =
            Firewall { mode: Mode::NoDivert, stateful: true, keep_marks: true, ..router(&["10.1.0.0/16"]) };
        let text = script(&wish, &names(), true);
        assert!(!text.contains(" jump ") && text.contains("ct state != { established, related } drop"));
        assert!(text.contains("add rule inet lacis output"));
    }

    #[test]
    fn other_bits_of_marks_are_left_alone() {
        let wish = Firewall { keep_marks: true, ports: vec![41641], ..router(&[]) };
        let text = script(&wish, &names(), true);
        assert!(text.contains("meta mark set meta mark & 0xff00ffff | 0x00080000"));
        assert!(text.contains("ct mark set ct mark & 0xff00ffff | 0x00080000"));
        assert!(text.contains("udp dport { 41641 }"));
    }

    #[test]
    fn with_an_exit_node_nothing_leaves_by_other_devices_but_what_the_link_needs() {
        let wish = Firewall {
            guard: Some(vec!["172.17.0.0/16".parse().unwrap()]),
            neighbours: vec!["tailscale0".into(), "a\"b".into()],
            bridges: vec!["br0".into()],
            sets_valid_mark: true,
            ..router(&[])
        };
        let text = script(&wish, &names(), true);
        let rules: Vec<_> =
            text.lines().filter_map(|line| line.strip_prefix("add rule inet lacis guard ")).collect();
        assert_eq!(rules[0], "oifname { \"lo\", \"lacis0\", \"tailscale0\" } return");
        assert_eq!(rules[1], "meta mark & 0x00ff0000 == 0x00080000 return");
        assert!(rules.contains(&"ip daddr { 172.17.0.0/16 } return") && rules.last() == Some(&"drop"));
        assert!(text.contains("add rule inet lacis hook-guard jump guard"));
        let forwarded = text.find("forward iifname \"br0\" oifname \"br0\" return").unwrap();
        assert!(forwarded < text.find("add rule inet lacis forward jump guard").unwrap());
        assert!(!text.contains("delete chain inet lacis set-src-valid-mark"));
    }

    #[test]
    fn devices_of_several_daemons_have_tables_of_their_own_and_no_name_is_code() {
        assert_eq!(Names::new("mesh1", 1, 1).unwrap().table, "lacis-mesh1");
        for bad in ["la*", "a\"b", "a\\", "a;b", "a b"] {
            assert!(Names::new(bad, 1, 1).is_none(), "{bad}");
        }
        assert!(is_ours("hook-input") && is_ours("postrouting") && !is_ours("theirs"));
    }
}
