//! Sets of ports by protocol, and how they are written.

use std::collections::BTreeMap;

use lacis_policy::Protocol;
use lacis_wire::control::PortRange;

/// Protocols of a filter rule that names none.
const DEFAULT_PROTOCOLS: [i32; 4] = [6, 17, ICMP, ICMP6];

const ICMP: i32 = 1;
const ICMP6: i32 = 58;

/// A protocol's name, or its number.
fn protocol(number: i32) -> String {
    u8::try_from(number).map_or_else(|_| number.to_string(), |number| Protocol(number).to_string())
}

/// Ports are a matter of TCP, UDP and SCTP.
fn has_ports(number: i32) -> bool {
    u8::try_from(number).is_ok_and(|number| Protocol(number).has_ports())
}

/// Ports, as sorted ranges that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports(Vec<(u16, u16)>);

impl Ports {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn add(&mut self, range: PortRange) {
        self.0.push((range.first, range.last));
        self.0.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::with_capacity(self.0.len());
        for (first, last) in self.0.drain(..) {
            match merged.last_mut() {
                Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
                _ => merged.push((first, last)),
            }
        }
        self.0 = merged;
    }

    /// What of these is not among those.
    pub(super) fn without(&self, those: &Self) -> Self {
        let mut left = Vec::new();
        for (first, last) in &self.0 {
            let mut from = u32::from(*first);
            for (start, end) in those.0.iter().filter(|(start, end)| start <= last && end >= first) {
                if from < u32::from(*start) {
                    left.push((from as u16, start - 1));
                }
                from = u32::from(*end) + 1;
            }
            if from <= u32::from(*last) {
                left.push((from as u16, *last));
            }
        }
        Self(left)
    }
}

impl std::fmt::Display for Ports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (at, (first, last)) in self.0.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            match (first, last) {
                (0, 65535) => write!(f, "{comma}*")?,
                (first, last) if first == last => write!(f, "{comma}{first}")?,
                (first, last) => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

/// What may be done somewhere: ports by protocol.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Access(BTreeMap<i32, Ports>);

impl Access {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds ports of a rule's protocols; none are the default ones. As packet filters have it: any rule lets pings
    /// through, and other protocols without ports need all ports.
    pub(super) fn add(&mut self, protocols: &[i32], range: PortRange) {
        const ALL: PortRange = PortRange { first: 0, last: u16::MAX };
        for number in [ICMP, ICMP6] {
            self.0.entry(number).or_default().add(ALL);
        }
        for number in if protocols.is_empty() { &DEFAULT_PROTOCOLS } else { protocols } {
            if has_ports(*number) || range == ALL {
                self.0.entry(*number).or_default().add(range);
            }
        }
    }

    /// What of this is not in that.
    pub(super) fn without(&self, that: &Self) -> Self {
        let nothing = Ports::default();
        let left = self
            .0
            .iter()
            .map(|(number, ports)| (*number, ports.without(that.0.get(number).unwrap_or(&nothing))));
        Self(left.filter(|(_, ports)| !ports.is_empty()).collect())
    }

    /// One text for each protocol, such as `tcp:22,80-90` or `icmp`.
    pub(super) fn texts(&self) -> Vec<String> {
        let text = |(number, ports): (&i32, &Ports)| {
            let name = protocol(*number);
            if has_ports(*number) { format!("{name}:{ports}") } else { name }
        };
        self.0.iter().map(text).collect()
    }
}

impl std::fmt::Display for Access {
    /// Protocols with the same ports together: `tcp+udp 53; icmp`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut together: Vec<(Option<&Ports>, Vec<String>)> = Vec::new();
        let with_ports = self.0.iter().filter(|(number, _)| has_ports(**number));
        let without = self.0.iter().filter(|(number, _)| !has_ports(**number));
        for (number, ports) in with_ports.chain(without) {
            let ports = has_ports(*number).then_some(ports);
            match together.iter_mut().find(|(known, _)| *known == ports) {
                Some((_, names)) => names.push(protocol(*number)),
                None => together.push((ports, vec![protocol(*number)])),
            }
        }
        for (at, (ports, names)) in together.iter().enumerate() {
            let separator = if at == 0 { "" } else { "; " };
            // One ICMP goes with the other.
            let both = ports.is_none() && names.contains(&protocol(ICMP)) && names.contains(&protocol(ICMP6));
            let names = names.iter().filter(|name| !both || **name != protocol(ICMP6));
            write!(f, "{separator}{}", names.cloned().collect::<Vec<_>>().join("+"))?;
            if let Some(ports) = ports {
                write!(f, " {ports}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(rules: &[(&[i32], u16, u16)]) -> Access {
        let mut access = Access::default();
        for (protocols, first, last) in rules {
            access.add(protocols, PortRange { first: *first, last: *last });
        }
        access
    }

    #[test]
    fn touching_ports_are_one_range() {
        assert_eq!(
            access(&[(&[6], 22, 22), (&[6], 80, 90), (&[6], 23, 25)]).texts(),
            ["icmp", "tcp:22-25,80-90", "ipv6-icmp"]
        );
        assert_eq!(access(&[(&[6], 0, 65534), (&[6], 65535, 65535)]).to_string(), "tcp *; icmp");
    }

    #[test]
    fn a_rule_without_protocols_is_about_the_usual_ones() {
        assert_eq!(access(&[(&[], 53, 53)]).to_string(), "tcp+udp 53; icmp");
    }

    #[test]
    fn what_is_left_are_the_ports_that_the_other_has_not() {
        let (all, some) =
            (access(&[(&[6], 0, 65535)]), access(&[(&[6], 0, 21), (&[6], 80, 80), (&[6], 65535, 65535)]));
        assert_eq!(all.without(&some).texts(), ["tcp:22-79,81-65534"]);
        assert!(some.without(&all).is_empty());
        assert!(all.without(&all).is_empty());
    }

    #[test]
    fn any_rule_lets_pings_through_and_other_protocols_without_ports_need_all_ports() {
        assert!(access(&[(&[1], 1, 2)]).without(&access(&[(&[6], 5, 5)])).is_empty());
        assert_eq!(access(&[(&[47], 0, 65535)]).to_string(), "icmp+gre");
        assert_eq!(access(&[(&[47], 5, 5)]).to_string(), "icmp");
    }
}
