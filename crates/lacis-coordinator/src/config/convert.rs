//! From the configuration to what the other parts are given.

use std::collections::BTreeMap;

use lacis_wire::control::{DerpMap, DerpNode, DerpRegion};

use crate::core::policy::PolicySource;
use crate::core::{CoreConfig, TailnetConfig};

use super::scalars::Ip;
use super::types::{Config, EmbeddedRelaySettings, PolicySetting, Region, RelayNode, Tailnet};

/// How a DERP map says that a relay has no STUN.
const NO_STUN: i32 = -1;

impl Config {
    /// What the core is told.
    pub fn core(&self) -> CoreConfig {
        CoreConfig {
            server_url: self.server_url.0.as_str().to_owned(),
            tailnets: self.tailnets.iter().map(|(name, tailnet)| core_tailnet(name, tailnet)).collect(),
            derp_map: self.derp_map(),
            node_expiry: self.node_expiry.0,
            ephemeral_timeout: self.ephemeral_timeout.0,
        }
    }

    /// The relays as clients are told of them, the embedded one among them.
    pub fn derp_map(&self) -> DerpMap {
        let mut regions = BTreeMap::new();
        if let Some(relay) = self.embedded() {
            regions.insert(relay.id, self.embedded_region(&relay));
        }
        for (code, region) in &self.relays {
            regions.insert(region.id, declared_region(code, region));
        }
        DerpMap { regions, omit_default_regions: true, ..DerpMap::default() }
    }

    fn embedded_region(&self, relay: &EmbeddedRelaySettings) -> DerpRegion {
        let url = &self.server_url.0;
        let stun_port = relay.stun_listen.first().map_or(NO_STUN, |address| i32::from(address.0.port()));
        let node = DerpNode {
            name: format!("{}a", relay.id),
            region_id: relay.id,
            host_name: url.host().to_owned(),
            derp_port: url.port(),
            stun_port,
            ipv4: text(relay.ipv4),
            ipv6: text(relay.ipv6),
            insecure_for_tests: relay.insecure_for_tests,
            ..DerpNode::default()
        };
        region(relay.id, &relay.code, &relay.name, vec![node])
    }
}

fn region(id: u16, code: &str, name: &str, nodes: Vec<DerpNode>) -> DerpRegion {
    DerpRegion {
        region_id: id,
        region_code: code.to_owned(),
        region_name: name.to_owned(),
        nodes,
        ..DerpRegion::default()
    }
}

fn declared_region(code: &str, declared: &Region) -> DerpRegion {
    let nodes =
        declared.nodes.iter().enumerate().map(|(i, node)| declared_node(declared.id, i, node)).collect();
    region(declared.id, code, declared.name.as_deref().unwrap_or(code), nodes)
}

fn declared_node(region: u16, index: usize, node: &RelayNode) -> DerpNode {
    // 901a, 901b, … as relays are named by custom.
    let made = || match u8::try_from(index) {
        Ok(index) if index < 26 => format!("{region}{}", char::from(b'a' + index)),
        _ => format!("{region}-{index}"),
    };
    DerpNode {
        name: node.name.clone().unwrap_or_else(made),
        region_id: region,
        host_name: node.host_name.clone(),
        cert_name: node.cert_name.clone().unwrap_or_default(),
        ipv4: text(node.ipv4),
        ipv6: text(node.ipv6),
        stun_port: if node.stun_port == 0 { NO_STUN } else { i32::from(node.stun_port) },
        stun_only: node.stun_only,
        derp_port: node.port,
        insecure_for_tests: node.insecure_for_tests,
        can_port80: node.can_port_80,
    }
}

fn text(ip: Option<Ip>) -> String {
    ip.map(|ip| ip.0.to_string()).unwrap_or_default()
}

fn core_tailnet(name: &str, tailnet: &Tailnet) -> TailnetConfig {
    let dns = &tailnet.dns;
    let texts = |servers: &[super::Nameserver]| servers.iter().map(|server| server.0.clone()).collect();
    TailnetConfig {
        name: name.to_owned(),
        domain: tailnet.domain.0.clone(),
        magic_dns: dns.magic_dns,
        nameservers: texts(&dns.nameservers),
        override_local_dns: dns.override_local_dns,
        split: dns
            .split
            .iter()
            .map(|(suffix, servers)| (suffix.trim_end_matches('.').to_ascii_lowercase(), texts(servers)))
            .collect(),
        search_domains: dns.search_domains.iter().map(|domain| domain.0.clone()).collect(),
        extra_records: dns
            .extra_records
            .iter()
            .map(|record| (record.name.0.clone(), record.address.0))
            .collect(),
        policy: tailnet.policy.as_ref().map_or(PolicySource::Database, PolicySetting::source),
    }
}
