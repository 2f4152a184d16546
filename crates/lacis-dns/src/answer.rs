//! Answers that need nobody else: names of the mesh, their reverses, and what does not exist (the client dossier,
//! section 8.2, in its order).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::op::{Edns, Message, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use crate::state::DnsState;

/// Addresses may change with a node's login; short enough not to notice.
pub(crate) const TTL: u32 = 5;
/// How long "there is no such name" may be remembered.
const NEGATIVE_TTL: u32 = 10;
/// Discovery names of Bonjour, which hosts ask for all the time and nobody on the internet knows.
const BONJOUR: [&str; 5] = ["b", "db", "r", "dr", "lb"];

/// What becomes of a question.
#[derive(Debug)]
pub(crate) enum Decision {
    /// Here is the answer.
    Answer(Message),
    /// Somebody else knows: ask for this name.
    Forward(String),
}

/// The beginning of every answer to `query`.
pub(crate) fn response(query: &Message) -> Message {
    let mut message = Message::response(query.metadata.id, query.metadata.op_code);
    message.metadata = Metadata::response_from_request(&query.metadata);
    message.metadata.recursion_available = query.metadata.recursion_desired;
    message.metadata.response_code = ResponseCode::NoError;
    // A message has one question (RFC 9619); many would make an answer longer than the asker takes.
    message.add_queries(query.queries.first().cloned());
    if query.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(crate::resolver::MAX_UDP);
        message.set_edns(edns);
    }
    message
}

pub(crate) fn failed(query: &Message, code: ResponseCode) -> Message {
    let mut message = response(query);
    message.metadata.response_code = code;
    message
}

/// Decides about a message with one question.
pub(crate) fn decide(state: &DnsState, query: &Message) -> Decision {
    let [question] = query.queries.as_slice() else {
        return Decision::Answer(failed(query, ResponseCode::FormErr));
    };
    if query.metadata.op_code != OpCode::Query || question.query_class != DNSClass::IN {
        return Decision::Answer(failed(query, ResponseCode::NotImp));
    }
    let name = text(&question.name);
    if crate::state::in_zone(&name, "onion") || is_bonjour(&name) {
        return Decision::Answer(failed(query, ResponseCode::NXDomain));
    }
    let kind = question.query_type;
    if kind == RecordType::PTR
        && let Some(ip) = reverse(&name)
        && let Some(host) = state.name_of(ip)
    {
        return Decision::Answer(pointer(query, question, host));
    }
    if let Some(addresses) = state.addresses(&name) {
        return Decision::Answer(addressed(state, query, question, &addresses));
    }
    if let Some(ip) = via(state, &name) {
        return Decision::Answer(addressed(state, query, question, &[ip]));
    }
    if let Some(zone) = state.zone_of(&name) {
        let mut message = failed(query, ResponseCode::NXDomain);
        message.metadata.authoritative = true;
        // The zone itself exists, and so does everything above a known name.
        let mut known = state.hosts.keys().chain(state.extra_records.iter().map(|(name, _)| name));
        if name == zone || known.any(|known| crate::state::in_zone(known, &name)) {
            message.metadata.response_code = ResponseCode::NoError;
        }
        add_soa(&mut message, zone);
        return Decision::Answer(message);
    }
    Decision::Forward(name)
}

/// The address that a name says itself, such as `10-1-1-1-via-7` in the network's domain or alone.
fn via(state: &DnsState, name: &str) -> Option<IpAddr> {
    let (label, zone) = name.split_once('.').unwrap_or((name, ""));
    let in_domain =
        zone.is_empty() || (state.zone_of(name) == Some(zone) && !crate::state::in_zone(zone, "arpa"));
    in_domain.then(|| lacis_wire::via::parse_label(label)).flatten().map(IpAddr::V6)
}

/// A name as our tables have it.
pub(crate) fn text(name: &Name) -> String {
    name.to_ascii().trim_end_matches('.').to_ascii_lowercase()
}

fn is_bonjour(name: &str) -> bool {
    name.split_once("._dns-sd._udp").is_some_and(|(first, _)| BONJOUR.contains(&first))
}

fn pointer(query: &Message, question: &Query, host: &str) -> Message {
    let mut message = response(query);
    message.metadata.authoritative = true;
    if let Ok(name) = Name::from_ascii(format!("{host}.")) {
        message.add_answer(Record::from_rdata(question.name.clone(), TTL, RData::PTR(PTR(name))));
    }
    message
}

fn addressed(state: &DnsState, query: &Message, question: &Query, addresses: &[IpAddr]) -> Message {
    let mut message = response(query);
    message.metadata.authoritative = true;
    let kind = question.query_type;
    if matches!(kind, RecordType::NS | RecordType::SOA | RecordType::AXFR | RecordType::HINFO) {
        message.metadata.response_code = ResponseCode::NotImp;
        return message;
    }
    for ip in addresses.iter().filter(|ip| is_of_use(state, **ip)) {
        let data = match ip {
            IpAddr::V4(ip) if matches!(kind, RecordType::A | RecordType::ANY) => RData::A(A(*ip)),
            IpAddr::V6(ip) if matches!(kind, RecordType::AAAA | RecordType::ANY) => RData::AAAA(AAAA(*ip)),
            _ => continue,
        };
        message.add_answer(Record::from_rdata(question.name.clone(), TTL, data));
    }
    if message.answers.is_empty()
        && let Some(zone) = state.zone_of(&text(&question.name))
    {
        add_soa(&mut message, zone);
    }
    message
}

/// Of the mesh's addresses only families that this node has itself are of use to it.
pub(crate) fn is_of_use(state: &DnsState, ip: IpAddr) -> bool {
    let has_family = if ip.is_ipv4() { state.has_ipv4 } else { state.has_ipv6 };
    has_family || !crate::state::is_mesh(ip)
}

fn add_soa(message: &mut Message, zone: &str) {
    let Ok(zone) = Name::from_ascii(format!("{zone}.")) else { return };
    let Ok(contact) = Name::from_ascii("hostmaster").and_then(|name| name.append_domain(&zone)) else {
        return;
    };
    let seconds = NEGATIVE_TTL as i32;
    let soa = SOA::new(zone.clone(), contact, 1, seconds, seconds, seconds, NEGATIVE_TTL);
    message.add_authority(Record::from_rdata(zone, NEGATIVE_TTL, RData::SOA(soa)));
}

/// The address that a reverse name is about.
fn reverse(name: &str) -> Option<IpAddr> {
    if let Some(rest) = name.strip_suffix(".in-addr.arpa") {
        let mut octets = [0; 4];
        let mut labels = rest.split('.');
        for octet in octets.iter_mut().rev() {
            *octet = labels.next()?.parse().ok()?;
        }
        return labels.next().is_none().then(|| Ipv4Addr::from(octets).into());
    }
    let rest = name.strip_suffix(".ip6.arpa")?;
    let mut nibbles = 0_u128;
    let mut count = 0;
    for label in rest.split('.') {
        let digit = u128::from_str_radix(label, 16).ok().filter(|_| label.len() == 1)?;
        nibbles = nibbles.checked_shr(4)? | digit << 124;
        count += 1;
    }
    (count == 32).then(|| Ipv6Addr::from(nibbles).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    use crate::state::Upstream;

    fn state() -> DnsState {
        let hosts = HashMap::from([
            (
                "bob.lab.example".to_owned(),
                vec!["100.64.0.2".parse().unwrap(), "fd7a:115c:a1e0::2".parse().unwrap()],
            ),
            ("a.sub.lab.example".to_owned(), vec!["100.64.0.3".parse().unwrap()]),
        ]);
        DnsState {
            hosts,
            authoritative: vec![
                "lab.example".into(),
                "64.100.in-addr.arpa".into(),
                "0.e.1.a.c.5.1.1.a.7.d.f.ip6.arpa".into(),
            ],
            extra_records: vec![
                ("printer.lab.example".into(), "10.0.0.9".parse().unwrap()),
                ("web.things.lab.example".into(), "10.0.0.8".parse().unwrap()),
            ],
            has_ipv4: true,
            has_ipv6: true,
            ..DnsState::default()
        }
    }

    fn ask(state: &DnsState, name: &str, kind: RecordType) -> Message {
        let mut query = Message::query();
        query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        match decide(state, &query) {
            Decision::Answer(message) => message,
            Decision::Forward(name) => panic!("{name} would be passed on"),
        }
    }

    fn texts(message: &Message) -> Vec<String> {
        message.answers.iter().map(|record| record.data.to_string()).collect()
    }

    #[test]
    fn names_of_nodes_have_addresses_in_any_case_and_the_asked_spelling_returns() {
        let message = ask(&state(), "BOB.Lab.Example.", RecordType::A);
        assert_eq!(texts(&message), ["100.64.0.2"]);
        assert!(message.metadata.authoritative);
        assert_eq!(message.answers[0].name.to_ascii(), "BOB.Lab.Example.");
        assert_eq!(texts(&ask(&state(), "bob.lab.example.", RecordType::AAAA)), ["fd7a:115c:a1e0::2"]);
    }

    #[test]
    fn families_this_node_does_not_have_are_not_told() {
        let state = DnsState { has_ipv6: false, ..state() };
        let message = ask(&state, "bob.lab.example.", RecordType::AAAA);
        assert!(message.answers.is_empty());
        assert_eq!(message.metadata.response_code, ResponseCode::NoError);
        assert_eq!(message.authorities.len(), 1, "with the SOA, so that the absence may be remembered");
        let outside = ("six.lab.example".to_owned(), "2001:db8::6".parse().unwrap());
        let state = DnsState { extra_records: vec![outside], ..state };
        assert_eq!(texts(&ask(&state, "six.lab.example.", RecordType::AAAA)), ["2001:db8::6"]);
    }

    #[test]
    fn an_address_of_a_site_is_named_by_itself() {
        for name in ["10-1-1-1-via-7.lab.example.", "10-1-1-1-VIA-7."] {
            assert_eq!(texts(&ask(&state(), name, RecordType::AAAA)), ["fd7a:115c:a1e0:b1a:0:7:a01:101"]);
            let v4 = ask(&state(), name, RecordType::A);
            assert_eq!((v4.answers.len(), v4.metadata.response_code), (0, ResponseCode::NoError), "{name}");
        }
        for name in [
            "10-1-1-1-via-70000.lab.example.",
            "10-1-1-1-via-7.x.lab.example.",
            "10-1-1-1-via-7.64.100.in-addr.arpa.",
        ] {
            let message = ask(&state(), name, RecordType::AAAA);
            assert_eq!(message.metadata.response_code, ResponseCode::NXDomain, "{name}");
        }
        let named = HashMap::from([(
            "10-1-1-1-via-7.lab.example".to_owned(),
            vec!["fd7a:115c:a1e0::9".parse().unwrap()],
        )]);
        let state = DnsState { hosts: named, ..state() };
        assert_eq!(
            texts(&ask(&state, "10-1-1-1-via-7.lab.example.", RecordType::AAAA)),
            ["fd7a:115c:a1e0::9"]
        );
    }

    #[test]
    fn addresses_have_names() {
        assert_eq!(texts(&ask(&state(), "2.0.64.100.in-addr.arpa.", RecordType::PTR)), ["bob.lab.example."]);
        let nibbles: String =
            "fd7a115ca1e000000000000000000002".chars().rev().flat_map(|c| [c, '.']).collect();
        let v6 = format!("{nibbles}ip6.arpa.");
        assert_eq!(texts(&ask(&state(), &v6, RecordType::PTR)), ["bob.lab.example."]);
        let unknown = ask(&state(), "9.0.64.100.in-addr.arpa.", RecordType::PTR);
        assert_eq!(unknown.metadata.response_code, ResponseCode::NXDomain);
    }

    #[test]
    fn unknown_names_in_the_zone_do_not_exist_and_what_is_above_a_known_one_does() {
        assert_eq!(
            ask(&state(), "eve.lab.example.", RecordType::A).metadata.response_code,
            ResponseCode::NXDomain
        );
        for name in ["lab.example.", "sub.lab.example.", "things.lab.example."] {
            assert_eq!(
                ask(&state(), name, RecordType::A).metadata.response_code,
                ResponseCode::NoError,
                "{name}"
            );
        }
        assert_eq!(texts(&ask(&state(), "printer.lab.example.", RecordType::A)), ["10.0.0.9"]);
    }

    #[test]
    fn other_names_are_passed_on_and_some_never() {
        let mut query = Message::query();
        query.add_query(Query::query(Name::from_ascii("www.example.org.").unwrap(), RecordType::A));
        assert!(matches!(decide(&state(), &query), Decision::Forward(name) if name == "www.example.org"));
        for name in ["x.onion.", "lb._dns-sd._udp.home."] {
            assert_eq!(ask(&state(), name, RecordType::PTR).metadata.response_code, ResponseCode::NXDomain);
        }
    }

    #[test]
    fn the_longer_suffix_has_a_name_and_a_route_before_a_zone_of_its_length() {
        let route = |suffix: &str| (suffix.to_owned(), vec![Upstream::new("192.0.2.1", &[])]);
        let state = DnsState {
            routes: vec![route("7.64.100.in-addr.arpa"), route("corp.lab.example"), route("in-addr.arpa")],
            ..state()
        };
        let forwarded = |state: &DnsState, name: &str| {
            let mut query = Message::query();
            query.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::PTR));
            matches!(decide(state, &query), Decision::Forward(_))
        };
        for name in ["9.7.64.100.in-addr.arpa.", "www.corp.lab.example.", "1.2.0.192.in-addr.arpa."] {
            assert!(forwarded(&state, name), "{name}");
        }
        for name in ["9.8.64.100.in-addr.arpa.", "www.lab.example.", "2.0.64.100.in-addr.arpa."] {
            assert!(!forwarded(&state, name), "{name}");
        }
        let whole = DnsState { routes: vec![route("64.100.in-addr.arpa"), route("lab.example")], ..state };
        assert!(forwarded(&whole, "9.8.64.100.in-addr.arpa.") && forwarded(&whole, "www.lab.example."));
        assert!(!forwarded(&whole, "2.0.64.100.in-addr.arpa."), "a node's address has a name all the same");
        assert!(!forwarded(&whole, "bob.lab.example."));
    }

    #[test]
    fn damaged_reverse_names_are_names_of_nothing() {
        for name in [
            "1.2.3.in-addr.arpa",
            "1.2.3.4.5.in-addr.arpa",
            "x.ip6.arpa",
            "1.ip6.arpa",
            "300.1.1.1.in-addr.arpa",
        ] {
            assert_eq!(reverse(name), None, "{name}");
        }
    }
}
