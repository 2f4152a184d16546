//! `lacis ping`.

use std::time::Duration;

use anyhow::{anyhow, bail};
use lacis_wire::local::PingResult;
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
        let (ip, name) = match meant(&status, &self.target) {
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
            eprintln!("lookup {:?} => {ip} ({name})", self.target);
        }
        Ok(self.tries(daemon, &ip).await?)
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
}
