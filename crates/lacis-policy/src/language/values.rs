//! Texts inside a policy that are a language of their own: names of capabilities, ports of grants, durations, logins,
//! pools of addresses, properties.

use ipnet::IpNet;
use lacis_wire::control::PortRange;

use super::selector::{self, Selector, Wrong};
use super::{Login, Property, Target};

/// Longest time that one check of an SSH session lasts, in seconds.
const LONGEST_CHECK: u64 = 168 * 3600;

/// Capabilities of Tailscale's own that a policy may grant.
const TAILSCALE_CAPABILITIES: [&str; 6] = ["drive", "kubernetes", "relay", "secrets", "tsidp", "webui"];

/// Longest name of a capability, in characters.
const MAX_CAPABILITY_NAME: usize = 255;

/// What is wrong with a capability's name.
pub(super) fn capability_name(name: &str) -> Option<Wrong> {
    if name.chars().count() > MAX_CAPABILITY_NAME || name.contains(char::is_control) {
        let help = format!("at most {MAX_CAPABILITY_NAME} characters, none of them a control character");
        return Some((format!("{name:?} cannot be the name of a capability"), Some(help)));
    }
    let form = || {
        let help = "such as example.com/cap/editor".to_owned();
        Some((format!("{name:?}: capability name must have the form {{domain}}/{{path}}"), Some(help)))
    };
    match name.split_once('/') {
        Some((domain, path)) if !domain.is_empty() && !path.is_empty() && !domain.contains(':') => {
            let own = path.strip_prefix("cap/").is_some_and(|cap| TAILSCALE_CAPABILITIES.contains(&cap));
            (domain == "tailscale.com" && !own).then(|| {
                let known = TAILSCALE_CAPABILITIES.join(", ");
                (
                    format!("{name:?}: capability name must not be in the tailscale.com domain"),
                    Some(format!("except for tailscale.com/cap/ with {known}")),
                )
            })
        }
        _ => form(),
    }
}

/// `*`, `443`, `*:443`, `tcp:443`, `udp:*`, `icmp:*`.
pub(super) fn grant_ports(text: &str) -> Result<(Option<u8>, Vec<PortRange>), Wrong> {
    let Some((protocol, ports)) = text.split_once(':') else {
        let usual = |(message, help)| match selector::protocol(text) {
            Ok(_) => (message, Some(format!("all of a protocol is written {text}:*"))),
            Err(_) => (message, help),
        };
        return Ok((None, selector::ports(text).map_err(usual)?));
    };
    if ports.contains(':') {
        return Err((format!("{text:?}: expected only one colon between protocol and ports"), None));
    }
    // As in `tailcfg.ProtoPortRange`: the same as the ports alone.
    if protocol == "*" {
        return Ok((None, selector::ports(ports)?));
    }
    let protocol = selector::protocol(protocol)?;
    let ports = selector::ports(ports)?;
    if !selector::has_ports(protocol) && ports != [selector::ALL_PORTS] {
        let name = selector::show_protocol(protocol);
        return Err((format!("{text:?}: protocol {name} does not support specific ports"), None));
    }
    Ok((Some(protocol), ports))
}

/// A duration as Go's `time.ParseDuration` reads it, such as `12h`, `1h30m`, `45s`, `0`; or `always`. In whole seconds,
/// rounded down; 0 is to ask always.
pub(super) fn check_period(text: &str) -> Result<u64, Wrong> {
    if text == "always" {
        return Ok(0);
    }
    let negative = text.starts_with('-');
    let rest = text.strip_prefix(['-', '+']).unwrap_or(text);
    let invalid = || {
        let help = "such as 12h, 1h30m or always".to_owned();
        (format!("{text:?} is an invalid duration"), Some(help))
    };
    let mut seconds = 0.0;
    let mut left = if rest == "0" { "" } else { rest };
    if rest.is_empty() {
        return Err(invalid());
    }
    while !left.is_empty() {
        let end = left.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(invalid)?;
        let number: f64 = left[..end].parse().map_err(|_| invalid())?;
        let unit_end =
            left[end..].find(|c: char| c.is_ascii_digit() || c == '.').map_or(left.len(), |at| at + end);
        seconds += number
            * match &left[end..unit_end] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                // with the micro sign, or a small mu
                "us" | "\u{b5}s" | "\u{3bc}s" => 1e-6,
                "ns" => 1e-9,
                _ => return Err(invalid()),
            };
        left = &left[unit_end..];
    }
    if negative && seconds > 0.0 {
        return Err((format!("checkPeriod {text} must be a positive duration"), None));
    }
    if seconds > LONGEST_CHECK as f64 {
        return Err((format!("checkPeriod {text} is above the max (168h)"), None));
    }
    Ok(seconds as u64)
}

pub(super) fn login(text: &str) -> Result<Login, Wrong> {
    match text {
        "autogroup:nonroot" => return Ok(Login::NonRoot),
        "" | "*" => {
            let help = "autogroup:nonroot is everybody but root".to_owned();
            return Err((format!("user {text:?} is not valid"), Some(help)));
        }
        _ => {}
    }
    match text.strip_prefix("localpart:*@") {
        Some(domain) if !domain.is_empty() => Ok(Login::LocalPart(domain.to_owned())),
        _ => Ok(Login::Name(text.to_owned())),
    }
}

/// `posture:NAME`.
pub(super) fn posture_name(text: &str) -> Result<String, Wrong> {
    match text.strip_prefix("posture:") {
        Some(name) if !name.is_empty() => Ok(text.to_owned()),
        _ => Err((format!("{text:?} is no posture: postures start with 'posture:'"), None)),
    }
}

/// A pool of addresses for nodes: inside the range that meshes use, and clear of what is reserved in it.
pub(super) fn pool(text: &str) -> Result<IpNet, Wrong> {
    let net: IpNet = text
        .parse()
        .map_err(|_| (format!("{text:?} is an invalid network"), Some("such as 100.81.0.0/16".to_owned())))?;
    let mesh: IpNet = "100.64.0.0/10".parse().map_err(|_| (String::new(), None))?;
    if !mesh.contains(&net) {
        return Err((format!("ipPool {text} must be within 100.64.0.0/10"), None));
    }
    for reserved in ["100.100.0.0/24", "100.100.100.0/24", "100.115.92.0/23"] {
        if let Ok(reserved) = reserved.parse::<IpNet>()
            && (reserved.contains(&net) || net.contains(&reserved))
        {
            return Err((format!("ipPool {text} must not overlap the reserved range {reserved}"), None));
        }
    }
    Ok(net)
}

/// `group:guest -> tag:prod:*`, with a protocol before the arrow's end if it likes: `* -> udp resolver:53`.
pub(super) fn property(text: &str) -> Result<Property, Wrong> {
    let shape = || {
        let help = "such as \"group:guest -> tag:prod:*\" or \"* -> udp resolver:53\"".to_owned();
        (format!("{text:?} is no property"), Some(help))
    };
    let (from, to) = text.split_once("->").ok_or_else(shape)?;
    let mut words = to.split_whitespace();
    let (protocol, target) = match (words.next(), words.next(), words.next()) {
        (Some(target), None, None) => (None, target),
        (Some(protocol), Some(target), None) => (Some(selector::protocol(protocol)?), target),
        _ => return Err(shape()),
    };
    let from = Selector::parse(from.trim())?;
    if matches!(from, Selector::Own | Selector::Internet) {
        return Err((format!("{from} cannot be the source of a property"), None));
    }
    let (to, ports) = selector::with_ports(target)?;
    Ok(Property { from, protocol, to: Target { to, ports } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        assert_eq!(check_period("1h30m"), Ok(5400));
        assert_eq!(check_period("168h"), Ok(LONGEST_CHECK));
        assert_eq!(check_period("always"), Ok(0));
        for text in ["0s", "0", "-0s", "0h0m", "500ms"] {
            assert_eq!(check_period(text), Ok(0), "{text}");
        }
        assert_eq!(check_period("+1.5h.5m"), Ok(5430));
        for text in ["168h0m1s", "abc", "-1m", "", "12", "-", " 1h", "1h ", "1d"] {
            assert!(check_period(text).is_err(), "{text}");
        }
    }

    #[test]
    fn grants_name_protocols_and_ports() {
        assert_eq!(grant_ports("*"), Ok((None, vec![selector::ALL_PORTS])));
        assert_eq!(grant_ports("tcp:80-443").unwrap().0, Some(6));
        assert_eq!(grant_ports("icmp:*").unwrap().0, Some(1));
        for text in [
            "tcp:0", "icmp:5", "*:+80", "tcp:1:2", "abc", "", "icmp", "tcp", "TCP", "tcp:icmp", "tcp:tcp",
            "tcp:", ":80", "+80", " 80", "80-", "tcp:+80", "tcp: 80", "tcp:80-", "0:*", "+6:80",
        ] {
            assert!(grant_ports(text).is_err(), "{text}");
        }
    }

    #[test]
    fn properties_have_an_arrow() {
        let property = property("* -> udp resolver:53").unwrap();
        assert_eq!((property.from, property.protocol), (Selector::Any, Some(17)));
        for text in ["a:1", "* -> ", "* -> a b c:1", "autogroup:self -> a:1", "* -> host"] {
            assert!(super::property(text).is_err(), "{text}");
        }
    }
}
