//! The relays a client may use, by region.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use super::json::{is_default, nullable};

/// Region id to region.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct DerpMap {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub home_params: Option<DerpHomeParams>,
    #[serde(deserialize_with = "regions")]
    pub regions: BTreeMap<u16, DerpRegion>,
    #[serde(
        rename = "omitDefaultRegions",
        skip_serializing_if = "is_default",
        deserialize_with = "nullable"
    )]
    pub omit_default_regions: bool,
}

fn regions<'de, D: Deserializer<'de>>(d: D) -> Result<BTreeMap<u16, DerpRegion>, D::Error> {
    let regions = Option::<BTreeMap<u16, Option<DerpRegion>>>::deserialize(d)?.unwrap_or_default();
    Ok(regions.into_iter().filter_map(|(id, region)| Some((id, region?))).collect())
}

/// How attractive regions are as a home, beside their latency.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct DerpHomeParams {
    /// Multiplies the latency; below 1 is preferred.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region_score: Option<BTreeMap<u16, f64>>,
}

/// Relays that serve the same clients.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct DerpRegion {
    #[serde(rename = "RegionID")]
    pub region_id: u16,
    #[serde(deserialize_with = "nullable")]
    pub region_code: String,
    #[serde(deserialize_with = "nullable")]
    pub region_name: String,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub avoid: bool,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub no_measure_no_home: bool,
    #[serde(deserialize_with = "nullable")]
    pub nodes: Vec<DerpNode>,
}

/// One relay or STUN server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct DerpNode {
    #[serde(deserialize_with = "nullable")]
    pub name: String,
    #[serde(rename = "RegionID")]
    pub region_id: u16,
    #[serde(deserialize_with = "nullable")]
    pub host_name: String,
    /// Another certificate name, or `sha256-raw:` and the leaf's SHA-256.
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub cert_name: String,
    /// An address, "" for DNS, anything else to turn the family off.
    #[serde(rename = "IPv4", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub ipv4: String,
    #[serde(rename = "IPv6", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub ipv6: String,
    /// 0 is 3478, -1 is none.
    #[serde(rename = "STUNPort", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub stun_port: i32,
    #[serde(rename = "STUNOnly", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub stun_only: bool,
    /// 0 is 443.
    #[serde(rename = "DERPPort", skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub derp_port: u16,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub insecure_for_tests: bool,
    #[serde(skip_serializing_if = "is_default", deserialize_with = "nullable")]
    pub can_port80: bool,
}

impl DerpNode {
    /// The relay's TCP port.
    pub fn port(&self) -> u16 {
        if self.derp_port == 0 { 443 } else { self.derp_port }
    }

    /// The STUN port, if there is one.
    pub fn stun(&self) -> Option<u16> {
        match self.stun_port {
            0 => Some(3478),
            port => u16::try_from(port).ok(),
        }
    }
}
