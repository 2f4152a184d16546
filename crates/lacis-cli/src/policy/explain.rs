//! `lacis policy explain FILE --from alice --to web --port 443`.

use std::path::PathBuf;

use anyhow::bail;
use lacis_policy::{Decision, Endpoint, Network, Protocol};
use serde_json::{Value, json};

use super::Answer;
use super::input::Who;
use super::who::resolve;
use crate::output;

#[derive(Debug, clap::Args)]
pub(crate) struct Explain {
    /// HuJSON, or YAML when its name ends so; without it the policy that is in force
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// Who sends: a node's name, an address, a user, a tag or a group
    #[arg(long)]
    from: String,
    /// To whom
    #[arg(long)]
    to: String,
    /// To which port; TCP, UDP and SCTP have them
    #[arg(long)]
    port: Option<u16>,
    /// By which protocol, by name or number
    #[arg(long, default_value = "tcp", value_parser = str::parse::<Protocol>)]
    proto: Protocol,
    #[command(flatten)]
    who: Who,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// End with 1 when something is not allowed
    #[arg(long)]
    exit_code: bool,
}

/// A ping is asked about in both families: the two ends may share one alone.
fn decide(network: &Network, from: Endpoint, to: Endpoint, protocol: Protocol, port: u16) -> Decision {
    if !protocol.is_icmp() {
        return network.decide(from, to, protocol, port);
    }
    let [v4, v6] =
        [Protocol::ICMP, Protocol::ICMPV6].map(|protocol| network.decide(from, to, protocol, port));
    let v6_says_more = (v6.allowed && !v4.allowed) || v4.because.is_empty();
    if v6_says_more { v6 } else { v4 }
}

impl Explain {
    pub(super) async fn run(self) -> anyhow::Result<Answer> {
        let portless = !self.proto.has_ports();
        if self.port.is_none() && !portless {
            bail!("to which port? Add --port N, or --proto icmp");
        }
        let (network, name) = self.who.network(self.file.as_deref()).await?;
        let (from, to) = (resolve(&network, &self.from)?, resolve(&network, &self.to)?);
        let port = self.port.unwrap_or(0);
        let what = if portless { self.proto.to_string() } else { format!("{}/{port}", self.proto) };
        let several = from.len() * to.len() > 1;
        let rules = network.policy().to_json();
        let mut all = true;
        let mut answers = Vec::new();
        for source in &from {
            for target in &to {
                if several && source == target {
                    continue;
                }
                let decision = decide(&network, source.end, target.end, self.proto, port);
                all &= decision.allowed;
                if self.json {
                    answers.push(json(&source.name, &target.name, &decision, &rules));
                    continue;
                }
                let verdict = if decision.allowed { "allowed" } else { "not allowed" };
                output::line(format!("{} -> {} {what}: {verdict}", source.name, target.name));
                for reason in &decision.because {
                    if reason.place.is_empty() {
                        output::line(format!("  {}", reason.text));
                        continue;
                    }
                    let at = reason.at.map_or_else(String::new, |at| format!("{at}: "));
                    let rule =
                        rule_text(&rules, &reason.place).map_or_else(String::new, |text| format!(": {text}"));
                    output::line(format!("  {name}:{at}{}{rule}: {}", reason.place, reason.text));
                }
                if decision.because.is_empty() {
                    output::line("  no rule comes near it");
                }
            }
        }
        if self.json {
            output::json(&answers)?;
        }
        Ok(if self.exit_code && !all { Answer::No } else { Answer::Yes })
    }
}

/// A rule in one line: `group:staff -> tag:web:443 (tcp)`. Nothing when there is none at this place (`acls[0]`).
fn rule_text(policy: &Value, place: &str) -> Option<String> {
    let (section, rest) = place.split_once('[')?;
    // Sections are found whatever their case; the policy is in its one spelling here.
    let (_, rules) = policy.as_object()?.iter().find(|(name, _)| name.eq_ignore_ascii_case(section))?;
    let rule = rules.get(rest.split(']').next()?.parse::<usize>().ok()?)?;
    let list = |key: &str| -> Vec<&str> {
        rule.get(key).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect()
    };
    let mut text = format!("{} -> {}", list("src").join(", "), list("dst").join(", "));
    let proto: Vec<&str> = rule.get("proto").and_then(Value::as_str).into_iter().collect();
    let via: Vec<String> = list("via").into_iter().map(|tag| format!("via {tag}")).collect();
    let via: Vec<&str> = via.iter().map(String::as_str).collect();
    let details = [proto.as_slice(), &list("ip"), &list("srcPosture"), &via].concat();
    if !details.is_empty() {
        text.push_str(" (");
        text.push_str(&details.join(", "));
        text.push(')');
    }
    Some(text)
}

fn json(from: &str, to: &str, decision: &Decision, rules: &Value) -> Value {
    let because = decision.because.iter().map(|reason| {
        json!({
            "line": reason.at.map(|at| at.line),
            "column": reason.at.map(|at| at.column),
            "place": reason.place,
            "rule": rule_text(rules, &reason.place),
            "text": reason.text,
        })
    });
    json!({ "from": from, "to": to, "allowed": decision.allowed, "because": because.collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_told_in_one_line() {
        let policy = json!({
            "acls": [{"src": ["a@", "tag:b"], "dst": ["tag:c:1-2"], "proto": "udp"}],
            "grants": [
                {"src": ["*"], "dst": ["net"], "ip": ["tcp:443"], "via": ["tag:r"]},
                {"src": ["*"], "dst": ["net"], "ip": ["*"], "srcPosture": ["posture:p"]},
            ],
        });
        let text = |place| rule_text(&policy, place);
        assert_eq!(text("acls[0]").unwrap(), "a@, tag:b -> tag:c:1-2 (udp)");
        assert_eq!(text("grants[0].dst[0]").unwrap(), "* -> net (tcp:443, via tag:r)");
        assert_eq!(text("grants[1]").unwrap(), "* -> net (*, posture:p)");
        assert_eq!(text("ACLs[0]"), text("acls[0]"));
        assert_eq!(text("acls[1]"), None);
        assert_eq!(text("no acls, no grants"), None);
    }
}
