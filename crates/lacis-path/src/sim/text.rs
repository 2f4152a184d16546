//! Scenarios as one line of text: what a failing test prints and what regressions are kept as.
//!
//! Parts end with `;`, words in them are separated by spaces. A link is
//! `delay,jitter,loss,twice,mtu`, a NAT `mapping/filtering/ports` with its variations behind it:
//! `seed 7 hops 1 relay 10 coordinator 50; router core any/port/keep open link 10,0,0,0,1500 lan 0; place r0 v4;
//! place core v4 v6 link 5,0,10,0,1400; node 0 41641 low search; flow 0 1 500; at 9000 move 0 1`.

use std::fmt;
use std::str::{FromStr, SplitWhitespace};

use super::router::{Depends, Nat, Ports};
use super::scenario::{Event, Family, Link, Net, NodeSpec, Place, RouterSpec, Scenario, Udp};

/// What could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotAScenario(String);

impl fmt::Display for NotAScenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not a scenario: cannot read {:?}", self.0)
    }
}

impl std::error::Error for NotAScenario {}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, core_hops, relay_delay, coordinator_delay, .. } = self;
        write!(f, "seed {seed} hops {core_hops} relay {relay_delay} coordinator {coordinator_delay}")?;
        for RouterSpec { outside, nat, v6_firewall, udp, link, lan } in &self.routers {
            write!(f, "; router {} {}", Word(*outside), Word(*nat))?;
            f.write_str(if *v6_firewall { " firewall" } else { "" })?;
            f.write_str(match udp {
                Udp::Passes => "",
                Udp::BlockedOut => " noout",
                Udp::BlockedIn => " noin",
            })?;
            write!(f, " link {} lan {lan}", Word(*link))?;
        }
        for Place { net, v4, v6, link } in &self.places {
            let (v4, v6) = (if *v4 { " v4" } else { "" }, if *v6 { " v6" } else { "" });
            write!(f, "; place {}{v4}{v6} link {}", Word(*net), Word(*link))?;
        }
        for NodeSpec { place, port, low_ports, searches, stock } in &self.nodes {
            let low = if *low_ports { " low" } else { "" };
            let search = if *searches { " search" } else { "" };
            let stock = if *stock { " stock" } else { "" };
            write!(f, "; node {place} {port}{low}{search}{stock}")?;
        }
        for (from, to, start) in &self.flows {
            write!(f, "; flow {from} {to} {start}")?;
        }
        for (at, event) in &self.events {
            write!(f, "; at {at} {}", Word(*event))?;
        }
        Ok(())
    }
}

/// A part that is written as words.
struct Word<T>(T);

impl fmt::Display for Word<Net> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Net::Core => f.write_str("core"),
            Net::Inside(router) => write!(f, "r{router}"),
        }
    }
}

impl fmt::Display for Word<Link> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Link { delay, jitter, loss, twice, mtu } = self.0;
        write!(f, "{delay},{jitter},{loss},{twice},{mtu}")
    }
}

impl fmt::Display for Word<Nat> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Nat { mapping, filtering, ports, open_input, hairpin, lifetime, most_flows } = self.0;
        let name = |depends| match depends {
            Depends::Nothing => "any",
            Depends::Address => "address",
            Depends::Port => "port",
        };
        write!(f, "{}/{}/", name(mapping), name(filtering))?;
        match ports {
            Ports::Keep => f.write_str("keep")?,
            Ports::Linux => f.write_str("linux")?,
            Ports::Random => f.write_str("random")?,
            Ports::Block(first, last) => write!(f, "{first}-{last}")?,
            Ports::Counter(first) => write!(f, "{first}+")?,
        }
        f.write_str(if open_input { " open" } else { "" })?;
        f.write_str(if hairpin { " hairpin" } else { "" })?;
        if lifetime != Nat::CONE.lifetime {
            write!(f, " life {} {}", lifetime.0, lifetime.1)?;
        }
        most_flows.map_or(Ok(()), |most| write!(f, " flows {most}"))
    }
}

impl fmt::Display for Word<Event> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Event::Move { node, place } => write!(f, "move {node} {place}"),
            Event::Reboot(router) => write!(f, "reboot {router}"),
            Event::NewAddress(router) => write!(f, "renumber {router}"),
            Event::BlockUdp(router) => write!(f, "block {router}"),
            Event::PathDies { a, b, family } => {
                let family = match family {
                    Family::V4 => "v4",
                    Family::V6 => "v6",
                    Family::Both => "both",
                };
                write!(f, "dies {a} {b} {family}")
            }
            Event::RelayDown { ms } => write!(f, "norelay {ms}"),
            Event::RelayLost { node, ms } => write!(f, "lostrelay {node} {ms}"),
            Event::CoordinatorAway { ms } => write!(f, "nocoordinator {ms}"),
            Event::Restart(node) => write!(f, "restart {node}"),
            Event::Quiet { ms } => write!(f, "quiet {ms}"),
        }
    }
}

/// The words of one part.
struct Words<'a> {
    part: &'a str,
    rest: SplitWhitespace<'a>,
}

impl<'a> Words<'a> {
    fn error(&self) -> NotAScenario {
        NotAScenario(self.part.trim().to_owned())
    }

    fn word(&mut self) -> Result<&'a str, NotAScenario> {
        self.rest.next().ok_or(NotAScenario(self.part.trim().to_owned()))
    }

    fn number<T: FromStr>(&mut self) -> Result<T, NotAScenario> {
        self.word()?.parse().map_err(|_| self.error())
    }

    fn named<T: FromStr>(&mut self, name: &str) -> Result<T, NotAScenario> {
        if self.word()? != name {
            return Err(self.error());
        }
        self.number()
    }

    fn net(&mut self) -> Result<Net, NotAScenario> {
        let word = self.word()?;
        if word == "core" {
            return Ok(Net::Core);
        }
        let router = word.strip_prefix('r').and_then(|router| router.parse().ok());
        router.map(Net::Inside).ok_or(self.error())
    }

    fn link(&mut self) -> Result<Link, NotAScenario> {
        let numbers: Vec<u16> = self.word()?.split(',').map_while(|number| number.parse().ok()).collect();
        let [delay, jitter, loss, twice, mtu] = numbers[..] else { return Err(self.error()) };
        Ok(Link { delay, jitter, loss, twice, mtu })
    }

    fn nat(&mut self) -> Result<Nat, NotAScenario> {
        let parts: Vec<_> = self.word()?.split('/').collect();
        let [mapping, filtering, ports] = parts[..] else { return Err(self.error()) };
        let depends = |word| match word {
            "any" => Some(Depends::Nothing),
            "address" => Some(Depends::Address),
            "port" => Some(Depends::Port),
            _ => None,
        };
        let ports = match ports {
            "keep" => Some(Ports::Keep),
            "linux" => Some(Ports::Linux),
            "random" => Some(Ports::Random),
            _ => match ports.split_once('-') {
                Some((first, last)) => {
                    first.parse().ok().zip(last.parse().ok()).map(|(first, last)| Ports::Block(first, last))
                }
                None => ports.strip_suffix('+').and_then(|first| first.parse().ok()).map(Ports::Counter),
            },
        };
        let (Some(mapping), Some(filtering), Some(ports)) = (depends(mapping), depends(filtering), ports)
        else {
            return Err(self.error());
        };
        Ok(Nat { mapping, filtering, ports, ..Nat::CONE })
    }

    fn router(&mut self) -> Result<RouterSpec, NotAScenario> {
        let (outside, nat) = (self.net()?, self.nat()?);
        let mut router =
            RouterSpec { outside, nat, v6_firewall: false, udp: Udp::Passes, link: Link::GOOD, lan: 0 };
        while let Some(word) = self.rest.next() {
            match word {
                "open" => router.nat.open_input = true,
                "hairpin" => router.nat.hairpin = true,
                "life" => router.nat.lifetime = (self.number()?, self.number()?),
                "flows" => router.nat.most_flows = Some(self.number()?),
                "firewall" => router.v6_firewall = true,
                "noout" => router.udp = Udp::BlockedOut,
                "noin" => router.udp = Udp::BlockedIn,
                "link" => router.link = self.link()?,
                "lan" => router.lan = self.number()?,
                _ => return Err(self.error()),
            }
        }
        Ok(router)
    }

    fn place(&mut self) -> Result<Place, NotAScenario> {
        let mut place = Place { net: self.net()?, v4: false, v6: false, link: Link::GOOD };
        while let Some(word) = self.rest.next() {
            match word {
                "v4" => place.v4 = true,
                "v6" => place.v6 = true,
                "link" => place.link = self.link()?,
                _ => return Err(self.error()),
            }
        }
        Ok(place)
    }

    fn node(&mut self) -> Result<NodeSpec, NotAScenario> {
        let (place, port) = (self.number()?, self.number()?);
        let mut node = NodeSpec { place, port, low_ports: false, searches: false, stock: false };
        for word in self.rest.by_ref() {
            match word {
                "low" => node.low_ports = true,
                "search" => node.searches = true,
                "stock" => node.stock = true,
                _ => return Err(NotAScenario(self.part.trim().to_owned())),
            }
        }
        Ok(node)
    }

    fn event(&mut self) -> Result<Event, NotAScenario> {
        Ok(match self.word()? {
            "move" => Event::Move { node: self.number()?, place: self.number()? },
            "reboot" => Event::Reboot(self.number()?),
            "renumber" => Event::NewAddress(self.number()?),
            "block" => Event::BlockUdp(self.number()?),
            "dies" => {
                let (a, b) = (self.number()?, self.number()?);
                let family = match self.word()? {
                    "v4" => Family::V4,
                    "v6" => Family::V6,
                    "both" => Family::Both,
                    _ => return Err(self.error()),
                };
                Event::PathDies { a, b, family }
            }
            "norelay" => Event::RelayDown { ms: self.number()? },
            "lostrelay" => Event::RelayLost { node: self.number()?, ms: self.number()? },
            "nocoordinator" => Event::CoordinatorAway { ms: self.number()? },
            "restart" => Event::Restart(self.number()?),
            "quiet" => Event::Quiet { ms: self.number()? },
            _ => return Err(self.error()),
        })
    }
}

impl FromStr for Scenario {
    type Err = NotAScenario;

    fn from_str(text: &str) -> Result<Self, NotAScenario> {
        let mut parts = text.split(';').map(|part| Words { part, rest: part.split_whitespace() });
        let mut head = parts.next().ok_or(NotAScenario(text.to_owned()))?;
        let mut scenario = Self {
            seed: head.named("seed")?,
            core_hops: head.named("hops")?,
            relay_delay: head.named("relay")?,
            coordinator_delay: head.named("coordinator")?,
            routers: Vec::new(),
            places: Vec::new(),
            nodes: Vec::new(),
            flows: Vec::new(),
            events: Vec::new(),
        };
        for mut words in parts {
            match words.word()? {
                "router" => scenario.routers.push(words.router()?),
                "place" => scenario.places.push(words.place()?),
                "node" => scenario.nodes.push(words.node()?),
                "flow" => scenario.flows.push((words.number()?, words.number()?, words.number()?)),
                "at" => scenario.events.push((words.number()?, words.event()?)),
                _ => return Err(words.error()),
            }
        }
        Ok(scenario)
    }
}

#[cfg(test)]
mod tests {
    use super::super::generate;
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for scenario in (0..500).map(generate) {
            assert_eq!(scenario.to_string().parse(), Ok(scenario));
        }
    }

    #[test]
    fn what_is_no_scenario_is_refused_with_the_part_that_is_wrong() {
        let read = |text: &str| text.parse::<Scenario>().map_err(|error| error.to_string());
        let head = "seed 7 hops 1 relay 10 coordinator 50";
        assert!(read(head).is_ok());
        for part in ["router core any/port", "router r0 any/port/keep closed", "node 0 x", "at 5 explode 1"] {
            let error = read(&format!("{head}; {part}")).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
