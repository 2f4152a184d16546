//! `lacis ping`.

use std::time::Duration;

use anyhow::{anyhow, bail};
use http::Method;
use lacis_wire::local::{self, NatStatus, PathReport, PathTried, PingResult};
use tokio::time::{sleep, timeout};

use super::{Daemon, meant, short_name};
use crate::http::escaped;
use crate::{Failure, output};

/// Between two tries.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
pub(crate) struct Ping {
    /// Stop once a direct path is found
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set,
          num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    until_direct: bool,
    /// Number of tries; 0 is without end
    #[arg(short, default_value_t = 10)]
    c: u32,
    /// For each try
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// By a message inside the tunnel
    #[arg(long, conflicts_with = "icmp")]
    tsmp: bool,
    /// By an ICMP echo through the tunnel
    #[arg(long)]
    icmp: bool,
    /// Afterwards say in words how the peer is reached, why not directly, and what would help
    #[arg(long)]
    why: bool,
    /// With --why: only the report, as JSON
    #[arg(long, requires = "why")]
    json: bool,
    /// Print more
    #[arg(long)]
    verbose: bool,
    /// Name or address of a peer
    target: String,
}

impl Ping {
    fn kind(&self) -> &'static str {
        match (self.tsmp, self.icmp) {
            (true, _) => "TSMP",
            (_, true) => "ICMP",
            _ => "disco",
        }
    }

    pub(crate) async fn run(self, daemon: &Daemon) -> Result<(), Failure> {
        let status = daemon.status(true).await?;
        if let Some(sentence) = super::status::not_running(&status) {
            output::line(sentence);
            return Err(Failure::Quiet);
        }
        let (ip, name) = match meant(&status, &self.target)? {
            Some((node, true)) => {
                let own = node.tailscale_ips.first().map(ToString::to_string).unwrap_or_default();
                output::line(format_args!("{own} is this node itself"));
                return Ok(());
            }
            Some((node, false)) => {
                let ip =
                    node.tailscale_ips.first().ok_or_else(|| anyhow!("{} has no address", self.target))?;
                (ip.to_string(), short_name(node).to_owned())
            }
            // Perhaps an address behind a subnet router.
            None if self.target.parse::<std::net::IpAddr>().is_ok() => {
                (self.target.clone(), self.target.clone())
            }
            None => return Err(anyhow!("no peer is called {:?}: see `lacis status`", self.target).into()),
        };
        if self.verbose {
            output::note(format_args!("lookup {:?} => {ip} ({name})", self.target));
        }
        if !self.why {
            return Ok(self.tries(daemon, &ip).await?);
        }
        let result = if self.json { Ok(()) } else { self.tries(daemon, &ip).await };
        let path = format!("{}why?ip={}", local::OWN_PREFIX, escaped(&ip));
        let report: PathReport = daemon.0.json(Method::GET, &path, Vec::new()).await?;
        if self.json {
            output::json(&report)?;
        } else {
            lines(&report).into_iter().for_each(output::line);
        }
        Ok(result?)
    }

    async fn tries(&self, daemon: &Daemon, ip: &str) -> anyhow::Result<()> {
        let path = format!("ping?ip={}&type={}", escaped(ip), self.kind());
        let (mut answered, mut direct, mut done) = (false, false, 0_u32);
        loop {
            done += 1;
            match timeout(self.timeout, daemon.post::<PingResult>(&path)).await {
                Err(_) => output::line(format_args!("ping {:?} timed out", ip)),
                Ok(Err(error)) => return Err(error.into()),
                Ok(Ok(result)) if !result.err.is_empty() => bail!("{}", result.err),
                Ok(Ok(result)) => {
                    answered = true;
                    direct = !result.endpoint.is_empty();
                    output::line(pong(&result, self.kind()));
                    if self.kind() != "disco" && self.c == 10 && self.until_direct {
                        // One answer says all there is to say this way.
                        return Ok(());
                    }
                    if direct && self.until_direct {
                        return Ok(());
                    }
                }
            }
            if self.c != 0 && done >= self.c {
                break;
            }
            sleep(PAUSE).await;
        }
        if !answered {
            bail!("no reply");
        }
        if self.until_direct && !direct {
            bail!("direct connection not established");
        }
        Ok(())
    }
}

/// `pong from bob (100.64.0.2) via DERP(code) in 3 ms`.
fn pong(result: &PingResult, kind: &str) -> String {
    let via = if kind != "disco" {
        kind.to_owned()
    } else if !result.endpoint.is_empty() {
        result.endpoint.clone()
    } else if !result.derp_region_code.is_empty() {
        format!("DERP({})", result.derp_region_code)
    } else {
        "DERP".to_owned()
    };
    let ms = (result.latency_seconds * 1000.0).round().max(1.0);
    format!("pong from {} ({}) via {via} in {ms} ms", result.node_name, result.node_ip)
}

/// The report for people.
fn lines(report: &PathReport) -> Vec<String> {
    let via = match (&report.address, report.path.as_str()) {
        (Some(address), "direct") => format!("directly at {address}"),
        (Some(address), _) => {
            format!("at {address} and through the relay {}, until one is proven", report.relay)
        }
        (None, "relay") => format!("through the relay {}", report.relay),
        (None, _) => "by no path at all".to_owned(),
    };
    let mut lines = vec![String::new(), format!("{} is reached {via}.", report.peer)];
    lines.extend(report.reasons.iter().map(|reason| format!("  why: {reason}")));
    lines.extend(report.remedies.iter().map(|remedy| format!("  what helps: {remedy}")));
    lines.push(format!("  NAT here: {}", nat(&report.own_nat)));
    lines.push(match &report.peer_nat {
        Some(status) => format!("  NAT at {}: {}", report.peer, nat(status)),
        None => format!("  NAT at {}: not told", report.peer),
    });
    lines.extend(report.tried.iter().map(|tried| format!("  {}", tried_line(tried))));
    if report.probes > 0 {
        lines.push(format!("  searching ports took {} packets", report.probes));
    }
    lines
}

fn nat(status: &NatStatus) -> String {
    if !status.udp {
        return "no UDP passes".to_owned();
    }
    let mut text = match status.mapping.as_str() {
        "none" => "none".to_owned(),
        "endpoint-independent" => "the same port for all destinations".to_owned(),
        "varies" if status.allocator.is_empty() => "another port for every destination".to_owned(),
        "varies" => format!("another port for every destination ({})", status.allocator),
        _ => "not known yet".to_owned(),
    };
    if let Some(seen) = status.seen {
        text = format!("{text}, seen at {seen}");
    }
    text
}

fn tried_line(tried: &PathTried) -> String {
    let from = if tried.extra_socket { " (from a port of its own)" } else { "" };
    let result = match (tried.answered_ago, tried.too_small) {
        (Some(_), true) => "answers, but datagrams of full size do not pass".to_owned(),
        (Some(ago), false) => format!("answered {ago:.0} s ago"),
        (None, _) => format!("{} pings, no answer", tried.unanswered),
    };
    format!("{}{from}: {result}", tried.address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_are_those_that_scripts_look_for() {
        let result = PingResult {
            node_name: "bob".into(),
            node_ip: "100.64.0.2".into(),
            latency_seconds: 0.0032,
            derp_region_code: "home".into(),
            ..PingResult::default()
        };
        assert_eq!(pong(&result, "disco"), "pong from bob (100.64.0.2) via DERP(home) in 3 ms");
        assert_eq!(pong(&result, "TSMP"), "pong from bob (100.64.0.2) via TSMP in 3 ms");
        let direct = PingResult { endpoint: "192.0.2.1:41641".into(), ..result };
        assert_eq!(pong(&direct, "disco"), "pong from bob (100.64.0.2) via 192.0.2.1:41641 in 3 ms");
    }

    #[test]
    fn a_relayed_peer_is_explained() {
        let report = PathReport {
            peer: "bob".into(),
            path: "relay".into(),
            relay: "home".into(),
            own_nat: NatStatus { udp: true, mapping: "varies".into(), ..NatStatus::default() },
            tried: vec![PathTried {
                address: "192.0.2.1:41641".parse().unwrap(),
                extra_socket: false,
                unanswered: 4,
                answered_ago: None,
                too_small: false,
            }],
            reasons: vec!["the NAT in front of the peer is difficult".into()],
            remedies: vec!["map a port".into()],
            ..PathReport::default()
        };
        let text = lines(&report).join("\n");
        for part in [
            "bob is reached through the relay home.",
            "why: the NAT in front of the peer is difficult",
            "what helps: map a port",
            "NAT here: another port for every destination",
            "NAT at bob: not told",
            "192.0.2.1:41641: 4 pings, no answer",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
