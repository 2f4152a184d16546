//! What pairs of sides come to: the table `expect` of a topology, which its script measures against.
//!
//! ```toml
//! [expect]
//! sides = ["open", "cone", "symmetric"]   # the hosts open-a, open-b, cone-a, …
//!
//! # d: direct, o: direct often, r: relay, ?: either. Each row has the sides up to its own, in the order of `sides`.
//! [expect.lacisd]
//! open      = "d"
//! cone      = "d d"
//! symmetric = "d d r"
//! ```
//!
//! `o` is for what a search among ports finds with odds below certainty: a script that measures such a pair only once
//! may do so once more.
//!
//! There may be the tables `tailscaled` and `mixed` too, for pairs of Tailscale's clients and of one with one of ours.
//! Used by the script of the scenario and by [`crate::matrix`].

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// Outcomes of all pairs.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    /// The sides in the order of the tables. The hosts of side `x` are `x-a` and `x-b`.
    pub sides: Vec<String>,
    /// For two of our clients: by side, its outcomes with the sides up to itself.
    pub lacisd: BTreeMap<String, String>,
    /// For two of Tailscale's.
    pub tailscaled: Option<BTreeMap<String, String>>,
    /// For one of each.
    pub mixed: Option<BTreeMap<String, String>>,
}

impl Expect {
    /// The hosts of all sides.
    pub fn hosts(&self) -> impl Iterator<Item = String> {
        self.sides.iter().flat_map(|side| ["a", "b"].map(|end| format!("{side}-{end}")))
    }

    /// Checks that all hosts are there and that no pair is missing.
    pub fn check(&self, hosts: &BTreeSet<&str>) -> Result<()> {
        for name in self.hosts() {
            ensure!(hosts.contains(name.as_str()), "there is no host {name}");
        }
        self.check_table("lacisd", &self.lacisd)?;
        for (name, table) in [("tailscaled", &self.tailscaled), ("mixed", &self.mixed)] {
            if let Some(table) = table {
                self.check_table(name, table)?;
            }
        }
        Ok(())
    }

    fn check_table(&self, name: &str, table: &BTreeMap<String, String>) -> Result<()> {
        if let Some(unknown) = table.keys().find(|row| !self.sides.contains(row)) {
            anyhow::bail!("{name}.{unknown}: there is no such side in `sides`");
        }
        for (number, side) in self.sides.iter().enumerate() {
            let row = table.get(side).with_context(|| format!("{name}.{side} is missing"))?;
            let outcomes: Vec<&str> = row.split_whitespace().collect();
            ensure!(
                outcomes.len() == number + 1,
                "{name}.{side}: {} outcomes, but there are {} sides up to {side}",
                outcomes.len(),
                number + 1
            );
            if let Some(wrong) = outcomes.iter().find(|outcome| !["d", "o", "r", "?"].contains(outcome)) {
                anyhow::bail!("{name}.{side}: {wrong} is not d (direct), o (often), r (relay) or ? (either)");
            }
        }
        Ok(())
    }

    /// Only the pairs among some sides.
    pub fn only(&self, wanted: &[String]) -> Result<Self> {
        if let Some(unknown) = wanted.iter().find(|side| !self.sides.contains(side)) {
            anyhow::bail!("there is no side {unknown}: there are {}", self.sides.join(", "));
        }
        let kept: Vec<bool> = self.sides.iter().map(|side| wanted.contains(side)).collect();
        let cut = |table: &BTreeMap<String, String>| {
            let rows = table.iter().filter(|(side, _)| wanted.contains(side));
            rows.map(|(side, row)| {
                let outcomes = row.split_whitespace().zip(&kept).filter(|(_, kept)| **kept);
                (side.clone(), outcomes.map(|(outcome, _)| outcome).collect::<Vec<_>>().join(" "))
            })
            .collect()
        };
        Ok(Self {
            sides: self.sides.iter().filter(|side| wanted.contains(side)).cloned().collect(),
            lacisd: cut(&self.lacisd),
            tailscaled: self.tailscaled.as_ref().map(cut),
            mixed: self.mixed.as_ref().map(cut),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expect(lacisd: &str) -> Expect {
        toml::from_str(&format!("sides = [\"open\", \"cone\", \"sym\"]\n[lacisd]\n{lacisd}")).unwrap()
    }

    fn hosts() -> BTreeSet<&'static str> {
        BTreeSet::from(["open-a", "open-b", "cone-a", "cone-b", "sym-a", "sym-b", "hub"])
    }

    #[test]
    fn every_pair_has_its_outcome() {
        expect("open = \"d\"\ncone = \"d d\"\nsym = \"d ? o\"\n").check(&hosts()).unwrap();
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        for (table, want) in [
            ("open = \"d\"\ncone = \"d d\"\n", "lacisd.sym is missing"),
            ("open = \"d\"\ncone = \"d\"\nsym = \"d d r\"\n", "1 outcomes, but there are 2 sides"),
            ("open = \"d\"\ncone = \"d x\"\nsym = \"d d r\"\n", "x is not d"),
            ("open = \"d\"\ncone = \"d d\"\nsym = \"d d r\"\nkone = \"d\"\n", "no such side"),
        ] {
            let error = format!("{:#}", expect(table).check(&hosts()).unwrap_err());
            assert!(error.contains(want), "{table}: {error}");
        }
        let fewer = BTreeSet::from(["open-a", "open-b", "cone-a", "cone-b", "sym-a"]);
        let error = expect("open = \"d\"\ncone = \"d d\"\nsym = \"d d r\"\n").check(&fewer).unwrap_err();
        assert!(error.to_string().contains("no host sym-b"), "{error}");
    }

    #[test]
    fn some_sides_keep_the_outcomes_among_themselves() {
        let all = expect("open = \"d\"\ncone = \"d r\"\nsym = \"d ? r\"\n");
        let some = all.only(&["sym".to_owned(), "cone".to_owned()]).unwrap();
        assert_eq!(some.sides, ["cone", "sym"]);
        assert_eq!(some.lacisd["cone"], "r");
        assert_eq!(some.lacisd["sym"], "? r");
        assert!(
            all.only(&["kone".to_owned()]).unwrap_err().to_string().contains("there are open, cone, sym")
        );
    }
}
