//! `lacis ip`.

use std::net::IpAddr;

use anyhow::{anyhow, bail};

use super::{Daemon, meant};
use crate::{Failure, output};

#[derive(Debug, clap::Args)]
pub(crate) struct Ip {
    /// Only one address
    #[arg(short = '1')]
    one: bool,
    /// Only IPv4
    #[arg(short = '4', conflicts_with = "v6")]
    v4: bool,
    /// Only IPv6
    #[arg(short = '6')]
    v6: bool,
    /// Print nothing; fail unless one of the addresses is this
    #[arg(long, value_name = "IP")]
    assert: Option<IpAddr>,
    /// A peer instead of this node
    peer: Option<String>,
}

impl Ip {
    pub(crate) async fn run(self, daemon: &Daemon) -> Result<(), Failure> {
        let status = daemon.status(self.peer.is_some()).await?;
        let addresses = match &self.peer {
            Some(peer) => {
                let (node, _) = meant(&status, peer)?.ok_or_else(|| anyhow!("no peer is called {peer:?}"))?;
                node.tailscale_ips.clone()
            }
            None => status.tailscale_ips.clone(),
        };
        Ok(self.print(&addresses, &status.backend_state)?)
    }

    fn print(&self, addresses: &[IpAddr], state: &str) -> anyhow::Result<()> {
        if addresses.is_empty() {
            bail!("no addresses yet; the state is {state}");
        }
        if let Some(wanted) = self.assert {
            if addresses.contains(&wanted) {
                return Ok(());
            }
            bail!("{wanted} is not among the addresses {addresses:?}");
        }
        let wanted = |ip: &&IpAddr| if self.v4 { ip.is_ipv4() } else { !self.v6 || ip.is_ipv6() };
        let mut chosen: Vec<_> = addresses.iter().filter(wanted).collect();
        if self.one {
            chosen.truncate(1);
        }
        if chosen.is_empty() {
            bail!("no addresses of this family");
        }
        chosen.into_iter().for_each(output::line);
        Ok(())
    }
}
