//! From a text's tree to a policy: every key is known or refused by name, every value has its type, and every problem
//! is collected with its place. Here what all sections have in common; [`names`] reads who is who, [`rules`] the rest.

mod names;
mod rules;

use super::selector::{self, Selector, Wrong};
use super::values::posture_name;
use super::{Body, Mark, Said};
use crate::document::{Data, Document, Item, Key, entry, member};
use crate::problem::Problem;

/// Top-level keys of others that mean nothing here, and why.
const NOT_HONOURED: [(&str, &str); 3] = [
    ("derpMap", "relays are set in the coordinator's configuration"),
    ("OneCGNATRoute", "clients choose their routes themselves; use nodeAttrs with one-cgnat?v=true"),
    ("ipsets", "IP sets are not supported here, and a rule that names one is refused"),
];

/// What was read, with what is wrong and what is not honoured.
#[derive(Debug, Default)]
pub(crate) struct Reading {
    pub(crate) body: Body,
    pub(crate) problems: Vec<Problem>,
    pub(crate) warnings: Vec<Problem>,
}

/// Reads a policy's structure. References are not followed.
pub(crate) fn read(document: &Document) -> Reading {
    let mut reader = Reader::default();
    let body = reader.body(&document.root);
    reader.mixed_names();
    Reading { body, problems: reader.problems, warnings: reader.warnings }
}

/// A member of an object, and its place.
type Taken<'a> = Option<(&'a Item, String)>;

#[derive(Default)]
struct Reader {
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
    /// Where a name first stands that has an older one (`src`), and where such an older one (`users`).
    new_name: Option<(&'static str, Mark)>,
    old_name: Option<(&'static str, Mark)>,
}

/// An object being read: what is left in the end is unknown.
struct Fields<'a> {
    mark: Mark,
    left: Vec<&'a (Key, Item)>,
    known: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    /// Takes a member. Names match whatever their case, and null is as good as nothing, as for Go's `encoding/json`.
    fn take(&mut self, name: &'static str) -> Taken<'a> {
        self.known.push(name);
        let at = self.left.iter().position(|(key, _)| key.name.eq_ignore_ascii_case(name))?;
        let (key, item) = self.left.remove(at);
        (!matches!(item.data, Data::Null)).then(|| (item, member(&self.mark.place, &key.name)))
    }
}

fn mark(item: &Item, place: &str) -> Mark {
    Mark { at: item.at, place: place.to_owned() }
}

/// Is it something, and no empty list?
fn says_something(taken: &Taken<'_>) -> bool {
    taken.as_ref().is_some_and(|(item, _)| !matches!(&item.data, Data::List(items) if items.is_empty()))
}

impl Reader {
    fn wrong(&mut self, item: &Item, place: &str, message: impl Into<String>, help: Option<String>) {
        self.problems.push(mark(item, place).problem(message, help));
    }

    fn expected(&mut self, item: &Item, place: &str, what: &str) {
        self.wrong(item, place, format!("{what} is expected here, not {}", item.kind()), None);
    }

    fn fields<'a>(&mut self, item: &'a Item, place: &str) -> Option<Fields<'a>> {
        if let Data::Map(entries) = &item.data {
            return Some(Fields {
                mark: mark(item, place),
                left: entries.iter().collect(),
                known: Vec::new(),
            });
        }
        self.expected(item, place, "an object");
        None
    }

    /// An entry of a list of rules. Keys that begin with `#` are an interface's own notes (headscale-admin writes
    /// them), and mean nothing.
    fn rule<'a>(&mut self, item: &'a Item, place: &str) -> Option<Fields<'a>> {
        let mut fields = self.fields(item, place)?;
        fields.left.retain(|(key, _)| !key.name.starts_with('#'));
        Some(fields)
    }

    /// Takes a member that has an older name too.
    fn renamed<'a>(&mut self, fields: &mut Fields<'a>, new: &'static str, old: &'static str) -> Taken<'a> {
        let (by_new, by_old) = (fields.take(new), fields.take(old));
        for (first, name, taken) in [(&mut self.new_name, new, &by_new), (&mut self.old_name, old, &by_old)] {
            if first.is_none()
                && let Some((item, place)) = taken
            {
                *first = Some((name, mark(item, place)));
            }
        }
        by_new.or(by_old)
    }

    /// A file has old names or new ones, not both.
    fn mixed_names(&mut self) {
        let (Some((new, new_mark)), Some((old, old_mark))) = (self.new_name.take(), self.old_name.take())
        else {
            return;
        };
        let (mark, name, other, other_name) = if old_mark.at < new_mark.at {
            (new_mark, new, old_mark, old)
        } else {
            (old_mark, old, new_mark, new)
        };
        let message = format!(
            "{name:?} cannot be used beside {other_name:?} at {} ({}): old and new names are mixed in one file",
            other.place, other.at
        );
        let help = "\"users\" and \"ports\" are \"src\" and \"dst\" now; in tests \"user\" and \"allow\" are \"src\" and \"accept\"";
        self.problems.push(mark.problem(message, Some(help.to_owned())));
    }

    /// Refuses what was not taken.
    fn done(&mut self, fields: Fields<'_>) {
        for (key, _) in fields.left {
            let place = member(&fields.mark.place, &key.name);
            let at = Mark { at: key.at, place };
            if let Some(name) = fields.known.iter().find(|name| key.name.eq_ignore_ascii_case(name)) {
                self.problems
                    .push(at.problem(format!("the key {name:?} is given twice, in other capitals"), None));
                continue;
            }
            let help = selector::nearest(&key.name, fields.known.iter().copied())
                .map(|near| format!("did you mean {near:?}?"));
            self.problems.push(at.problem(format!("unknown field {:?}", key.name), help));
        }
    }

    /// The rules of a section; `None` when it is absent.
    fn section<T>(
        &mut self,
        taken: Taken<'_>,
        read: impl Fn(&mut Self, &Item, &str) -> Option<T>,
    ) -> Option<Vec<T>> {
        let taken = Some(taken?);
        let list = self.list(taken);
        Some(list.into_iter().filter_map(|(item, place)| read(self, item, &place)).collect())
    }

    /// The entries of a list; a missing one and null are empty.
    fn list<'a>(&mut self, taken: Taken<'a>) -> Vec<(&'a Item, String)> {
        match taken {
            None => Vec::new(),
            Some((item, place)) => match &item.data {
                Data::Null => Vec::new(),
                Data::List(items) => {
                    items.iter().enumerate().map(|(at, item)| (item, entry(&place, at))).collect()
                }
                _ => {
                    self.expected(item, &place, "a list");
                    Vec::new()
                }
            },
        }
    }

    fn text(&mut self, item: &Item, place: &str) -> Option<Said<String>> {
        if let Data::Text(text) = &item.data {
            return Some(Said { what: text.clone(), mark: mark(item, place) });
        }
        self.expected(item, place, "a text");
        None
    }

    fn texts(&mut self, taken: Taken<'_>) -> Vec<Said<String>> {
        let list = self.list(taken);
        list.into_iter().filter_map(|(item, place)| self.text(item, &place)).collect()
    }

    fn flag(&mut self, taken: Taken<'_>) -> bool {
        match taken {
            None => false,
            Some((item, place)) => match item.data {
                Data::Bool(value) => value,
                _ => {
                    self.expected(item, &place, "true or false");
                    false
                }
            },
        }
    }

    /// Reads a text by a function that says what is wrong with it.
    fn parsed<T>(
        &mut self,
        item: &Item,
        place: &str,
        parse: impl FnOnce(&str) -> Result<T, Wrong>,
    ) -> Option<Said<T>> {
        let text = self.text(item, place)?;
        match parse(&text.what) {
            Ok(what) => Some(Said { what, mark: text.mark }),
            Err((message, help)) => {
                self.problems.push(text.mark.problem(message, help));
                None
            }
        }
    }

    fn all<T>(&mut self, taken: Taken<'_>, parse: impl Fn(&str) -> Result<T, Wrong>) -> Vec<Said<T>> {
        let list = self.list(taken);
        list.into_iter().filter_map(|(item, place)| self.parsed(item, &place, &parse)).collect()
    }

    fn selectors(&mut self, taken: Taken<'_>) -> Vec<Said<Selector>> {
        self.all(taken, Selector::parse)
    }

    /// The sides of a rule, where blanks around a name do not count.
    fn parties(&mut self, taken: Taken<'_>) -> Vec<Said<Selector>> {
        self.all(taken, |text| Selector::parse(text.trim()))
    }

    fn body(&mut self, root: &Item) -> Body {
        let mut body = Body::default();
        let Some(mut fields) = self.fields(root, "") else { return body };
        if let Some((item, place)) = fields.take("groups") {
            body.groups = self.groups(item, &place);
        }
        if let Some((item, place)) = fields.take("hosts") {
            body.hosts = self.hosts(item, &place);
        }
        if let Some((item, place)) = fields.take("tagOwners") {
            body.tag_owners = self.tag_owners(item, &place);
        }
        if let Some((item, place)) = fields.take("postures") {
            body.postures = self.postures(item, &place);
        }
        body.default_posture = self.all(fields.take("defaultSrcPosture"), posture_name);
        if let Some((item, place)) = fields.take("autoApprovers") {
            self.auto_approvers(item, &place, &mut body);
        }
        body.acls = self.section(fields.take("acls"), Self::acl);
        body.grants = self.section(fields.take("grants"), Self::grant);
        body.ssh = self.section(fields.take("ssh"), Self::ssh).unwrap_or_default();
        body.node_attrs = self.section(fields.take("nodeAttrs"), Self::node_attrs).unwrap_or_default();
        body.tests = self.section(fields.take("tests"), Self::test).unwrap_or_default();
        body.ssh_tests = self.section(fields.take("sshTests"), Self::ssh_test).unwrap_or_default();
        if let Some((item, place)) = fields.take("properties") {
            self.properties(item, &place, &mut body);
        }
        body.randomize_client_port = self.flag(fields.take("randomizeClientPort"));
        if let Some((item, place)) = fields.take("disableIPv4")
            && self.flag(Some((item, place.clone())))
        {
            let help = Some("use nodeAttrs with the attribute disable-ipv4 and the target *".to_owned());
            self.wrong(item, &place, "disableIPv4 is not supported for a whole network", help);
        }
        for (name, why) in NOT_HONOURED {
            if let Some((item, place)) = fields.take(name) {
                let message = format!("{name} is not honoured: {why}");
                self.warnings.push(mark(item, &place).problem(message, None));
            }
        }
        self.done(fields);
        if body.acls.is_none() && body.grants.is_none() {
            let message = "there are neither acls nor grants: everybody reaches everything";
            let help = "\"acls\": [] allows nothing".to_owned();
            self.warnings.push(mark(root, "").problem(message, Some(help)));
        }
        body
    }
}
