//! `lacis whois`.

use lacis_wire::local::WhoIs;

use super::Daemon;
use crate::http::escaped;
use crate::{Failure, output};

#[derive(Debug, clap::Args)]
pub(crate) struct Whois {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Only this protocol (tcp or udp)
    #[arg(long, default_value = "")]
    proto: String,
    /// An address of the mesh, with or without a port
    #[arg(value_name = "IP[:PORT]")]
    address: String,
}

impl Whois {
    pub(crate) async fn run(self, daemon: &Daemon) -> Result<(), Failure> {
        let path = format!("whois?proto={}&addr={}", escaped(&self.proto), escaped(&self.address));
        let who: WhoIs = daemon.get(&path).await?;
        if self.json {
            return Ok(output::json(&who)?);
        }
        let list =
            |items: &[ipnet::IpNet]| items.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        output::line("Machine:");
        let mut machine = vec![
            ("Name:", who.node.name.trim_end_matches('.').to_owned()),
            ("ID:", who.node.stable_id.clone()),
            ("Addresses:", format!("[{}]", list(&who.node.addresses))),
        ];
        if who.node.allowed_ips() != who.node.addresses {
            machine.push(("AllowedIPs:", format!("[{}]", list(who.node.allowed_ips()))));
        }
        if !who.node.tags.is_empty() {
            machine.push(("Tags:", who.node.tags.join(", ")));
        }
        for (title, value) in machine {
            output::line(format_args!("  {title:<14} {value}"));
        }
        if who.node.tags.is_empty() {
            output::line("User:");
            output::line(format_args!("  {:<9} {}", "Name:", who.user_profile.login_name));
            output::line(format_args!("  {:<9} {}", "ID:", who.user_profile.id));
        }
        if !who.cap_map.is_empty() {
            output::line("Capabilities:");
            for (name, values) in &who.cap_map {
                match values.as_deref() {
                    None | Some([]) => output::line(format_args!("  - {name}")),
                    Some(values) => {
                        output::line(format_args!("  - {name}:"));
                        for value in values {
                            output::line(format_args!("      {value}"));
                        }
                    }
                }
            }
        }
        Ok(())
    }
}
