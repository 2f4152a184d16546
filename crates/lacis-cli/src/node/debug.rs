//! `lacis debug`: what helps to set something up, and asks no daemon.

use anyhow::{Context as _, bail};
use ipnet::{Ipv4Net, Ipv6Net};
use lacis_wire::via::{MAX_SITE, Via, parse_site};

use crate::{Failure, output};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Debug {
    /// Print the 4via6 route for an IPv4 network of a site, or what such a route stands for
    Via(ViaArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct ViaArgs {
    /// Number of the site (0 to 65535, or 0x hexadecimal); or a 4via6 route, alone
    #[arg(value_name = "SITE|ROUTE")]
    site: String,
    /// IPv4 network, such as 10.1.1.0/24
    #[arg(value_name = "CIDR")]
    net: Option<String>,
}

impl Debug {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let Self::Via(arguments) = self;
        output::line(arguments.answer()?);
        Ok(())
    }
}

impl ViaArgs {
    fn answer(&self) -> anyhow::Result<String> {
        let Some(net) = &self.net else {
            let route: Ipv6Net = self.site.parse().with_context(|| {
                format!("{} is no IPv6 route; for a site, give its number and an IPv4 network", self.site)
            })?;
            return Ok(Via::try_from(route)?.to_string());
        };
        let site = parse_site(&self.site).with_context(|| {
            format!("{} is no number of a site: use 0 to {MAX_SITE}, or 0x and hexadecimal digits", self.site)
        })?;
        let net: Ipv4Net =
            net.parse().with_context(|| format!("{net} is no IPv4 network; one looks like 10.1.1.0/24"))?;
        if net.trunc() != net {
            bail!("{net} has bits set after its prefix; did you mean {}?", net.trunc());
        }
        Ok(Via::new(site, net)?.to_ipv6().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(site: &str, net: Option<&str>) -> Result<String, String> {
        let arguments = ViaArgs { site: site.to_owned(), net: net.map(str::to_owned) };
        arguments.answer().map_err(|error| error.to_string())
    }

    #[test]
    fn a_route_is_printed_for_a_site_and_read_back() {
        let route = "fd7a:115c:a1e0:b1a:0:7:a01:100/120";
        assert_eq!(answer("7", Some("10.1.1.0/24")).unwrap(), route);
        assert_eq!(answer("0x7", Some("10.1.1.0/24")).unwrap(), route);
        assert_eq!(answer(route, None).unwrap(), "site 7 (0x7), 10.1.1.0/24");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (site, net, text) in [
            ("65536", Some("10.1.1.0/24"), "no number of a site"),
            ("x", Some("10.1.1.0/24"), "no number of a site"),
            ("7", Some("10.1.1.1/24"), "did you mean 10.1.1.0/24"),
            ("7", Some("fd00::/64"), "no IPv4 network"),
            ("7", None, "give its number and an IPv4 network"),
            ("fd00::/64", None, "is not in fd7a:115c:a1e0:b1a::/64"),
        ] {
            let said = answer(site, net).unwrap_err();
            assert!(said.contains(text), "{said}");
        }
    }
}
