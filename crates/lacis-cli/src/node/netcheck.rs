//! `lacis netcheck`: the daemon measures, this prints.

use std::time::Duration;

use http::Method;
use lacis_wire::local::{self, Netcheck as Answer, NetcheckReport};

use super::Daemon;
use crate::{Failure, output};

#[derive(Debug, clap::Args)]
pub(crate) struct Netcheck {
    /// Output: empty, json or json-line
    #[arg(long, default_value = "", value_parser = ["", "json", "json-line"])]
    format: String,
    /// The same as --format=json
    #[arg(long, conflicts_with = "format")]
    json: bool,
    /// Again and again, with this pause
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    every: Option<Duration>,
    /// Accepted for scripts
    #[arg(long, hide = true)]
    verbose: bool,
}

impl Netcheck {
    pub(crate) async fn run(self, daemon: &Daemon) -> Result<(), Failure> {
        let _ = self.verbose;
        loop {
            let path = format!("{}netcheck", local::OWN_PREFIX);
            let answer: Answer = daemon.0.json(Method::POST, &path, Vec::new()).await?;
            match self.format.as_str() {
                _ if self.json => output::json(&answer.report)?,
                "json" => output::json(&answer.report)?,
                "json-line" => output::line(serde_json::to_string(&answer.report)?),
                _ => lines(&answer).into_iter().for_each(output::line),
            }
            let Some(pause) = self.every else { return Ok(()) };
            tokio::time::sleep(pause).await;
        }
    }
}

fn ms(nanos: u64) -> String {
    format!("{:.1}ms", nanos as f64 / 1e6)
}

/// The protocols that the router speaks.
fn port_mapping(report: &NetcheckReport) -> String {
    let protocols = [("UPnP", report.upnp), ("NAT-PMP", report.pmp), ("PCP", report.pcp)];
    if protocols.iter().all(|(_, known)| known.is_none()) {
        return "not checked".to_owned();
    }
    let found: Vec<_> = protocols.iter().filter(|(_, is)| *is == Some(true)).map(|(name, _)| *name).collect();
    found.join(", ")
}

fn lines(Answer { report, derp_map }: &Answer) -> Vec<String> {
    let maybe = |known: Option<bool>| known.map_or_else(String::new, |known| known.to_string());
    let address = |works: bool, seen: &str| match (works, seen) {
        (true, "") => "yes".to_owned(),
        (true, seen) => format!("yes, {seen}"),
        (false, _) => "(no addr found)".to_owned(),
    };
    let ipv6 = match (report.ipv6, report.os_has_ipv6) {
        (true, _) => format!("yes, {}", report.global_v6),
        (false, true) => "no, but OS has support".to_owned(),
        (false, false) => "no, unavailable in OS".to_owned(),
    };
    let mut lines = vec![String::new(), "Report:".to_owned()];
    if let Some(now) = report.now
        && let Ok(now) = now.format(&time::format_description::well_known::Rfc3339)
    {
        lines.push(format!("\t* Time: {now}"));
    }
    lines.extend([
        format!("\t* UDP: {}", report.udp),
        format!("\t* IPv4: {}", address(report.ipv4, &report.global_v4)),
        format!("\t* IPv6: {ipv6}"),
        format!("\t* MappingVariesByDestIP: {}", maybe(report.mapping_varies_by_dest_ip)),
        format!("\t* HairPinning: {}", maybe(report.hair_pinning)),
        format!("\t* PortMapping: {}", port_mapping(report)),
    ]);
    if let Some(captive) = report.captive_portal {
        lines.push(format!("\t* CaptivePortal: {captive}"));
    }
    if !report.proxy.is_empty() {
        lines.push(format!("\t* Proxy: {}", report.proxy));
    }
    let region = |id: &u16| derp_map.regions.get(id);
    let mut by_latency: Vec<_> = report.region_latency.iter().collect();
    by_latency.sort_by_key(|(_, latency)| **latency);
    let reachable = by_latency.iter().find(|(id, _)| !report.region_unreachable.contains_key(id));
    match reachable.and_then(|(id, _)| region(id)) {
        Some(nearest) => lines.push(format!("\t* Nearest DERP: {}", nearest.region_name)),
        None => lines.push("\t* Nearest DERP: unknown (no response to latency probes)".to_owned()),
    }
    if !by_latency.is_empty() {
        lines.push("\t* DERP latency:".to_owned());
    }
    let measured = by_latency.iter().map(|(id, latency)| (**id, ms(**latency)));
    let silent = derp_map
        .regions
        .keys()
        .filter(|id| !report.region_latency.contains_key(id))
        .map(|id| (*id, String::new()));
    for (id, latency) in measured.chain(silent) {
        if let Some(region) = region(&id) {
            let problem = report.region_unreachable.get(&id);
            let problem = problem.map(|why| format!(" unreachable: {why}")).unwrap_or_default();
            lines.push(format!(
                "\t\t- {:>3}: {latency:<7} ({}){problem}",
                region.region_code, region.region_name
            ));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacis_wire::control::{DerpMap, DerpRegion};

    #[test]
    fn scripts_find_the_lines_they_know() {
        let region = DerpRegion {
            region_id: 900,
            region_code: "home".into(),
            region_name: "At home".into(),
            ..Default::default()
        };
        let answer = Answer {
            report: NetcheckReport {
                udp: true,
                ipv4: true,
                global_v4: "192.0.2.1:41641".into(),
                region_latency: [(900, 1_500_000)].into(),
                hair_pinning: Some(false),
                upnp: Some(true),
                pmp: Some(false),
                pcp: Some(true),
                captive_portal: Some(false),
                proxy: "http://proxy.example:3128".into(),
                ..NetcheckReport::default()
            },
            derp_map: DerpMap { regions: [(900, region)].into(), ..DerpMap::default() },
        };
        let text = lines(&answer).join("\n");
        for line in [
            "* UDP: true",
            "* IPv4: yes, 192.0.2.1:41641",
            "* HairPinning: false",
            "* PortMapping: UPnP, PCP",
            "* CaptivePortal: false",
            "* Proxy: http://proxy.example:3128",
            "* Nearest DERP: At home",
            "- home: 1.5ms   (At home)",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }

    #[test]
    fn a_relay_that_cannot_be_reached_is_named_and_is_not_the_nearest() {
        let region = |id: u16, code: &str, name: &str| {
            let (region_code, region_name) = (code.to_owned(), name.to_owned());
            (id, DerpRegion { region_id: id, region_code, region_name, ..DerpRegion::default() })
        };
        let answer = Answer {
            report: NetcheckReport {
                region_latency: [(1, 1_000_000), (2, 9_000_000)].into(),
                region_unreachable: [(1, "timed out".to_owned())].into(),
                ..NetcheckReport::default()
            },
            derp_map: DerpMap {
                regions: [region(1, "one", "First"), region(2, "two", "Second")].into(),
                ..DerpMap::default()
            },
        };
        let text = lines(&answer).join("\n");
        assert!(text.contains("* Nearest DERP: Second"), "{text}");
        assert!(text.contains("- one: 1.0ms   (First) unreachable: timed out"), "{text}");
        assert!(text.ends_with("- two: 9.0ms   (Second)"), "{text}");
    }

    #[test]
    fn what_was_not_asked_is_not_denied() {
        assert_eq!(port_mapping(&NetcheckReport::default()), "not checked");
        let none = NetcheckReport { upnp: Some(false), ..NetcheckReport::default() };
        assert_eq!(port_mapping(&none), "");
    }
}
