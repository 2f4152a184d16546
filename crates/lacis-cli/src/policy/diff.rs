//! `lacis policy diff OLD NEW`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use lacis_policy::Network;
use serde::Serialize;

use super::Answer;
use super::access::Access;
use super::input::{Named, Who};
use super::reach::{Change, changes};
use crate::output;

#[derive(Debug, clap::Args)]
pub(crate) struct Diff {
    /// The policy as it was
    #[arg(value_name = "OLD")]
    old: PathBuf,
    /// The policy as it is to be
    #[arg(value_name = "NEW")]
    new: PathBuf,
    #[command(flatten)]
    who: Who,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// End with 1 when there is a difference
    #[arg(long)]
    exit_code: bool,
}

/// One pair, in JSON.
#[derive(Debug, Serialize)]
struct Pair {
    from: String,
    to: String,
    gained: Vec<String>,
    lost: Vec<String>,
}

/// Names of nodes for which something besides ports changes.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Also {
    ssh: Vec<String>,
    attributes: Vec<String>,
    capabilities: Vec<String>,
    routes: Vec<String>,
}

impl Also {
    fn between(old: &Network, new: &Network) -> Self {
        let mut also = Self::default();
        let granted = |network: &Network, id| {
            let rules = network.filter(id);
            rules.iter().filter(|rule| !rule.cap_grant.is_empty()).cloned().collect::<Vec<_>>()
        };
        for node in new.nodes() {
            let id = node.id;
            let differences = [
                (&mut also.ssh, old.ssh_rules(id) != new.ssh_rules(id)),
                (&mut also.attributes, old.attributes(id) != new.attributes(id)),
                (&mut also.capabilities, granted(old, id) != granted(new, id)),
                (&mut also.routes, old.approved(id) != new.approved(id)),
            ];
            for (names, differs) in differences {
                names.extend(differs.then(|| node.name.clone()));
            }
        }
        also
    }

    fn lines(&self) -> Vec<String> {
        let all = [
            ("SSH rules", &self.ssh),
            ("attributes", &self.attributes),
            ("application capabilities", &self.capabilities),
            ("approved routes", &self.routes),
        ];
        let changed = all.into_iter().filter(|(_, names)| !names.is_empty());
        changed.map(|(what, names)| format!("{what} change: {}", names.join(", "))).collect()
    }
}

impl Diff {
    pub(super) async fn run(self) -> anyhow::Result<Answer> {
        let (old, new) = (Named::of_file(&self.old)?, Named::of_file(&self.new)?);
        let old = Network::compile(&old.policy, self.who.population().await?);
        let new = old.with_policy(&new.policy);
        let changes = changes(&old, &new);
        let also = Also::between(&old, &new);
        let same = changes.is_empty() && also == Also::default();
        if self.json {
            let pair = |change: &Change| Pair {
                from: change.from.clone(),
                to: change.to.clone(),
                gained: change.gained.texts(),
                lost: change.lost.texts(),
            };
            let pairs: Vec<Pair> = changes.iter().map(pair).collect();
            output::json(&serde_json::json!({ "pairs": pairs, "also": also }))?;
        } else if same {
            output::line("nothing changes");
        } else {
            let gained = grouped(changes.iter().map(|change| (change, &change.gained)));
            let lost = grouped(changes.iter().map(|change| (change, &change.lost)));
            for (title, mark, lines) in [("gained:", '+', &gained), ("lost:", '-', &lost)] {
                if !lines.is_empty() {
                    output::line(title);
                }
                for line in lines {
                    output::line(format!("  {mark} {line}"));
                }
            }
            for line in also.lines() {
                output::line(line);
            }
        }
        Ok(if self.exit_code && !same { Answer::No } else { Answer::Yes })
    }
}

/// Lines, with those together who gain or lose the same at the same places, and the places at which they do.
fn grouped<'a>(changes: impl Iterator<Item = (&'a Change, &'a Access)>) -> Vec<String> {
    let mut sources: BTreeMap<(&str, &Access), BTreeSet<&str>> = BTreeMap::new();
    for (change, access) in changes.filter(|(_, access)| !access.is_empty()) {
        sources.entry((&change.to, access)).or_default().insert(&change.from);
    }
    let mut places: BTreeMap<(BTreeSet<&str>, &Access), BTreeSet<&str>> = BTreeMap::new();
    for ((to, access), from) in sources {
        places.entry((from, access)).or_default().insert(to);
    }
    let list = |names: &BTreeSet<&str>| names.iter().copied().collect::<Vec<_>>().join(", ");
    places.iter().map(|((from, access), to)| format!("{} -> {}: {access}", list(from), list(to))).collect()
}
