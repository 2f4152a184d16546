//! What this host lacks to route for others or to use routes of others, in words: the daemon does not change how a
//! host forwards and filters, it says what to do.

use super::nft::{ForwardDrop, forward_drops};

const KEEP: &str = "and a line in /etc/sysctl.d to keep it";

/// Reads a setting by its path below `/proc/sys`, such as `net/ipv4/ip_forward`.
pub(crate) fn read_sysctl(path: &str) -> Option<String> {
    std::fs::read_to_string(format!("/proc/sys/{path}")).ok().map(|text| text.trim().to_owned())
}

/// Forwarding that is switched off, for the families asked for.
pub(crate) fn switched_off(v4: bool, v6: bool, read: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let switches = [
        (v4, "IPv4", "net.ipv4.ip_forward", "net/ipv4/ip_forward"),
        (v6, "IPv6", "net.ipv6.conf.all.forwarding", "net/ipv6/conf/all/forwarding"),
    ];
    switches
        .into_iter()
        .filter(|(asked, _, _, path)| *asked && read(path).is_some_and(|value| value == "0"))
        .map(|(_, family, name, _)| {
            format!(
                "this host does not forward {family}: `sysctl -w {name}=1`, {KEEP} (NixOS: services.lacis.client.routing = \"server\")"
            )
        })
        .collect()
}

/// All that keeps this host from forwarding between `device` and its networks, of the families asked for.
pub(crate) async fn obstacles(device: &str, v4: bool, v6: bool) -> Vec<String> {
    let mut found = switched_off(v4, v6, read_sysctl);
    found.extend(dropped(device, v4, v6, &forward_drops(device).await));
    found
}

/// Chains of the host's own firewall in which what is forwarded ends.
pub(super) fn dropped(device: &str, v4: bool, v6: bool, drops: &[ForwardDrop]) -> Vec<String> {
    let concerns = |drop: &&ForwardDrop| match drop.family.as_str() {
        "ip" => v4,
        "ip6" => v6,
        _ => v4 || v6,
    };
    drops
        .iter()
        .filter(concerns)
        .map(|ForwardDrop { family, table, name, .. }| {
            format!(
                "this host's firewall drops what is forwarded (chain {name} of table {family} {table}) and has no rule for {device}: \
                 `nft insert rule {family} {table} {name} iifname {device} accept`, and the same with oifname"
            )
        })
        .collect()
}

/// Strict reverse-path filters that drop answers to the daemon's own packets, which the mesh's routes would send
/// elsewhere. `marks_kept`: the rules that tell those packets are in place.
pub(super) fn reverse_path(
    device: &str,
    marks_kept: bool,
    devices: &[String],
    read: impl Fn(&str) -> Option<String>,
) -> Option<String> {
    let value = |of: &str, name: &str| -> u32 {
        read(&format!("net/ipv4/conf/{of}/{name}")).and_then(|text| text.parse().ok()).unwrap_or(0)
    };
    let strict = |of: &&String| {
        let of = of.as_str();
        let valid_mark = value("all", "src_valid_mark").max(value(of, "src_valid_mark")) != 0;
        value("all", "rp_filter").max(value(of, "rp_filter")) == 1 && !(marks_kept && valid_mark)
    };
    let own = ["all", "default", "lo", device];
    let found = devices.iter().filter(|of| !own.contains(&of.as_str())).find(strict)?;
    Some(if marks_kept {
        format!(
            "the strict reverse-path filter of {found} drops answers to lacisd itself: `sysctl -w net.ipv4.conf.all.src_valid_mark=1`, {KEEP} (NixOS: services.lacis.client.routing = \"client\")"
        )
    } else {
        format!(
            "the strict reverse-path filter of {found} drops answers to lacisd itself: `sysctl -w net.ipv4.conf.{found}.rp_filter=2`, {KEEP}, or let lacisd set marks with `lacis set --netfilter-mode=on`"
        )
    })
}

/// Names of this host's devices, as the settings have them.
pub(super) fn devices() -> Vec<String> {
    let Ok(found) = std::fs::read_dir("/proc/sys/net/ipv4/conf") else { return Vec::new() };
    let mut names: Vec<_> = found.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Bridges whose packets pass the firewall of routed ones (the module `br_netfilter`, which Docker loads).
pub(super) fn filtered_bridges() -> Vec<String> {
    let filtered = |name: &str| read_sysctl(&format!("net/bridge/{name}")).is_some_and(|value| value != "0");
    if !filtered("bridge-nf-call-iptables") && !filtered("bridge-nf-call-ip6tables") {
        return Vec::new();
    }
    let Ok(found) = std::fs::read_dir("/sys/class/net") else { return Vec::new() };
    let bridges = found.filter_map(Result::ok).filter(|entry| entry.path().join("bridge").is_dir());
    let mut names: Vec<_> = bridges.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sysctls(values: &'static [(&str, &str)]) -> impl Fn(&str) -> Option<String> {
        |path| values.iter().find(|(known, _)| *known == path).map(|(_, value)| (*value).to_owned())
    }

    #[test]
    fn forwarding_that_is_off_is_named_with_the_command() {
        let read = sysctls(&[("net/ipv4/ip_forward", "0"), ("net/ipv6/conf/all/forwarding", "1")]);
        let missing = switched_off(true, true, read);
        assert_eq!(missing.len(), 1);
        assert!(missing[0].contains("sysctl -w net.ipv4.ip_forward=1"), "{missing:?}");
        assert!(switched_off(false, true, sysctls(&[("net/ipv4/ip_forward", "0")])).is_empty());
    }

    #[test]
    fn a_strict_filter_matters_unless_marks_are_kept_and_count() {
        let devices: Vec<String> = ["all", "default", "eth0", "lacis0", "lo"].map(Into::into).to_vec();
        let strict = [("net/ipv4/conf/eth0/rp_filter", "1"), ("net/ipv4/conf/lacis0/rp_filter", "1")];
        let strict: &'static [_] = Box::leak(Box::new(strict));
        let said = |marks, values| reverse_path("lacis0", marks, &devices, sysctls(values));
        assert!(said(true, strict).unwrap().contains("src_valid_mark=1"));
        assert!(said(false, strict).unwrap().contains("eth0.rp_filter=2"));
        let valid: &'static [_] =
            &[("net/ipv4/conf/eth0/rp_filter", "1"), ("net/ipv4/conf/all/src_valid_mark", "1")];
        assert_eq!(said(true, valid), None);
        assert!(said(false, valid).is_some());
        let loose: &'static [_] =
            &[("net/ipv4/conf/eth0/rp_filter", "1"), ("net/ipv4/conf/all/rp_filter", "2")];
        assert_eq!(said(false, loose), None);
    }

    #[test]
    fn a_chain_that_drops_concerns_the_families_that_are_routed() {
        let drop = |family: &str| ForwardDrop {
            family: family.into(),
            table: "filter".into(),
            name: "FORWARD".into(),
            ..ForwardDrop::default()
        };
        let said = dropped("lacis0", true, false, &[drop("ip"), drop("ip6"), drop("inet")]);
        assert_eq!(said.len(), 2);
        assert!(said[0].contains("nft insert rule ip filter FORWARD iifname lacis0 accept"), "{said:?}");
    }
}
