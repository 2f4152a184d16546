//! Who is who: groups, hosts, owners of tags, approvers of routes, postures. Members are read even where their name is
//! wrong, so that all mistakes are reported at once.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::{Reader, Taken, mark};
use crate::document::{Item, member};
use crate::language::posture::Condition;
use crate::language::selector::Selector;
use crate::language::values::posture_name;
use crate::language::{Body, Mark, Said};

impl Reader {
    pub(super) fn groups(&mut self, item: &Item, place: &str) -> BTreeMap<String, Said<Vec<Said<String>>>> {
        let mut groups = BTreeMap::new();
        let Some(fields) = self.fields(item, place) else { return groups };
        for (key, item) in fields.left {
            let place = member(place, &key.name);
            if key.name.strip_prefix("group:").is_none_or(str::is_empty) {
                let message = format!("group name {:?} must start with 'group:'", key.name);
                self.problems.push(Mark { at: key.at, place: place.clone() }.problem(message, None));
            }
            let mut members = Vec::new();
            for text in self.texts(Some((item, place.clone()))) {
                match Selector::parse(&text.what) {
                    Ok(Selector::User(_) | Selector::Domain(_)) => members.push(text),
                    Ok(Selector::Group(_)) => {
                        let message = format!(
                            "groups[{:?}]: {:?}: group members cannot be recursive",
                            key.name, text.what
                        );
                        let help = "name the users of the other group one by one".to_owned();
                        self.problems.push(text.mark.problem(message, Some(help)));
                    }
                    _ => {
                        let message = format!("{:?} is no user", text.what);
                        let help = "members are email addresses, or NAME@".to_owned();
                        self.problems.push(text.mark.problem(message, Some(help)));
                    }
                }
            }
            groups.insert(key.name.clone(), Said { what: members, mark: Mark { at: key.at, place } });
        }
        groups
    }

    pub(super) fn hosts(&mut self, item: &Item, place: &str) -> BTreeMap<String, Said<IpNet>> {
        let mut hosts = BTreeMap::new();
        let Some(fields) = self.fields(item, place) else { return hosts };
        for (key, item) in fields.left {
            let place = member(place, &key.name);
            if !matches!(Selector::parse(&key.name), Ok(Selector::Host(_))) {
                let message = format!("{:?} cannot be a host's alias", key.name);
                let help = "an alias has letters, digits, '-', '_' and '.', and is no address".to_owned();
                self.problems.push(Mark { at: key.at, place: place.clone() }.problem(message, Some(help)));
            }
            let net = self.parsed(item, &place, |text| match Selector::parse(text) {
                Ok(Selector::Address(address)) => Ok(IpNet::from(address)),
                Ok(Selector::Net(net)) => Ok(net),
                Err(wrong) if text.contains('/') => Err(wrong),
                _ => Err((
                    format!("{text:?} is an invalid address"),
                    Some("an address or a network".to_owned()),
                )),
            });
            if let Some(net) = net {
                hosts.insert(key.name.clone(), net);
            }
        }
        hosts
    }

    pub(super) fn tag_owners(
        &mut self,
        item: &Item,
        place: &str,
    ) -> BTreeMap<String, Said<Vec<Said<Selector>>>> {
        let mut owners = BTreeMap::new();
        let Some(fields) = self.fields(item, place) else { return owners };
        for (key, item) in fields.left {
            let place = member(place, &key.name);
            match Selector::parse(&key.name) {
                Ok(Selector::Tag(_)) => {}
                other => {
                    let message = match other {
                        Err((message, _)) => message,
                        Ok(_) => format!("{:?} is no tag: tags start with 'tag:'", key.name),
                    };
                    self.problems.push(Mark { at: key.at, place: place.clone() }.problem(message, None));
                }
            }
            let list = self.selectors(Some((item, place.clone())));
            let mut of_tag = Vec::new();
            for owner in list {
                if owner.what.is_people() || matches!(owner.what, Selector::Tag(_)) {
                    of_tag.push(owner);
                } else {
                    let message = format!("{} cannot own a tag", owner.what);
                    let help = "users, groups, roles and other tags can".to_owned();
                    self.problems.push(owner.mark.problem(message, Some(help)));
                }
            }
            owners.insert(key.name.clone(), Said { what: of_tag, mark: Mark { at: key.at, place } });
        }
        owners
    }

    fn approvers(&mut self, taken: Taken<'_>) -> Vec<Said<Selector>> {
        let mut list = self.selectors(taken);
        list.retain(|approver| {
            let fits = approver.what.is_people() || matches!(approver.what, Selector::Tag(_));
            if !fits {
                let message = format!("{} cannot be an auto approver", approver.what);
                let help = "users, groups, roles and tags can".to_owned();
                self.problems.push(approver.mark.problem(message, Some(help)));
            }
            fits
        });
        list
    }

    pub(super) fn auto_approvers(&mut self, item: &Item, place: &str, body: &mut Body) {
        let Some(mut fields) = self.fields(item, place) else { return };
        if let Some((item, place)) = fields.take("routes")
            && let Some(routes) = self.fields(item, &place)
        {
            for (key, item) in routes.left {
                let place = member(&place, &key.name);
                let at = Mark { at: key.at, place: place.clone() };
                let approvers = self.approvers(Some((item, place)));
                match key.name.parse::<IpNet>() {
                    Ok(net) if net.trunc() == net => {
                        body.auto_routes.push((Said { what: net, mark: at }, approvers));
                    }
                    Ok(net) => {
                        let help = Some(format!("the network is {}", net.trunc()));
                        let message = format!("{:?} has bits set after its prefix", key.name);
                        self.problems.push(at.problem(message, help));
                    }
                    Err(_) => {
                        let help = Some("such as 10.0.0.0/8".to_owned());
                        self.problems.push(at.problem(format!("{:?} is an invalid network", key.name), help));
                    }
                }
            }
        }
        body.auto_exit = self.approvers(fields.take("exitNode"));
        if let Some((item, place)) = fields.take("services") {
            let message = "autoApprovers.services is not honoured: services are not supported here";
            self.warnings.push(mark(item, &place).problem(message, None));
        }
        self.done(fields);
    }

    pub(super) fn postures(
        &mut self,
        item: &Item,
        place: &str,
    ) -> BTreeMap<String, Said<Vec<Said<Condition>>>> {
        let mut postures = BTreeMap::new();
        let Some(fields) = self.fields(item, place) else { return postures };
        for (key, item) in fields.left {
            let place = member(place, &key.name);
            let at = Mark { at: key.at, place: place.clone() };
            let what = self.all(Some((item, place)), Condition::parse);
            match posture_name(&key.name) {
                Ok(name) => drop(postures.insert(name, Said { what, mark: at })),
                Err((message, help)) => self.problems.push(at.problem(message, help)),
            }
        }
        postures
    }
}
