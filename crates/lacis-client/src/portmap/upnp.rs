//! UPnP IGD: the router is found by a multicast question, describes itself in XML, and maps ports by SOAP.
//!
//! Only the router itself is believed: answers of other hosts are ignored, and whatever address a description names,
//! it is the router's that is asked.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::{Method, Request, StatusCode, Uri};
use http_body_util::Full;
use roxmltree::{Document, Node, ParsingOptions};
use socket2::SockRef;
use tokio::time::timeout;

use super::{LEASE, Refused, Router};
use crate::marked;

const GROUP: Ipv4Addr = Ipv4Addr::new(239, 255, 255, 250);
const SSDP_PORT: u16 = 1900;
/// Devices answer at a random moment within the second that they are given.
const SEARCH: Duration = Duration::from_millis(1200);
/// One HTTP exchange.
const EXCHANGE: Duration = Duration::from_millis(1500);
/// Devices to look for; one of a later version should answer to the first, and does not always.
const DEVICES: [&str; 2] = [
    "urn:schemas-upnp-org:device:InternetGatewayDevice:1",
    "urn:schemas-upnp-org:device:InternetGatewayDevice:2",
];
/// Services that map ports, the best first.
const SERVICES: [&str; 3] = [
    "urn:schemas-upnp-org:service:WANIPConnection:2",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "urn:schemas-upnp-org:service:WANPPPConnection:1",
];
/// Parts of a router's XML, and services of it that are asked one after the other. Real ones have a few hundred and two.
const MAX_NODES: u32 = 16384;
const MAX_SERVICES: usize = 4;
/// What users see in their router's list.
const DESCRIPTION: &str = "lacis";
/// The external ports tried when others have them already.
const TRIES: usize = 4;
/// "Conflict in mapping entry": somebody has that port.
const CONFLICT: Refused = Refused(718);
/// "Only permanent leases supported", and what old routers say instead ("invalid args").
const PERMANENT_ONLY: [Refused; 2] = [Refused(725), Refused(402)];

#[derive(Debug, thiserror::Error)]
pub(super) enum UpnpError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("no answer in time")]
    Late(#[from] tokio::time::error::Elapsed),
    #[error("{0}")]
    Refused(Refused),
    #[error("the router's answer is not understood: {0}")]
    Strange(String),
}

fn strange(what: impl ToString) -> UpnpError {
    UpnpError::Strange(what.to_string())
}

/// A service of the router that maps ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Service {
    /// One of [`SERVICES`].
    kind: &'static str,
    address: SocketAddrV4,
    /// Where its commands go: path and query.
    path: String,
}

/// The best service of the router that has an external address.
pub(super) async fn find(router: Router, fwmark: Option<u32>) -> Result<Service, UpnpError> {
    let location = timeout(SEARCH, search(router, fwmark)).await??;
    let address = SocketAddrV4::new(router.address, location.port_u16().unwrap_or(80));
    let path = location.path_and_query().map_or("/", |path| path.as_str());
    let (status, text) = exchange(address, fwmark, Method::GET, path, &[], String::new()).await?;
    if status != StatusCode::OK {
        return Err(strange(format!("its description comes with status {status}")));
    }
    let mut trouble = strange("it has no service that maps ports");
    for service in services(&text, address, path)? {
        match service.external_ip(fwmark).await {
            Ok(_) => return Ok(service),
            Err(error) => trouble = error,
        }
    }
    Err(trouble)
}

/// Asks who is a router; gives where the router's description is.
async fn search(router: Router, fwmark: Option<u32>) -> Result<Uri, UpnpError> {
    let socket = marked::udp(SocketAddrV4::new(router.own, 0).into(), fwmark)?;
    SockRef::from(&socket).set_multicast_if_v4(&router.own)?;
    for device in DEVICES {
        let question = format!(
            "M-SEARCH * HTTP/1.1\r\nHOST: {GROUP}:{SSDP_PORT}\r\nMAN: \"ssdp:discover\"\r\nMX: 1\r\nST: {device}\r\n\r\n"
        );
        for to in [router.address, GROUP] {
            // Without multicast there is still the router, and the other way round.
            if let Err(error) = socket.send_to(question.as_bytes(), (to, SSDP_PORT)).await {
                tracing::trace!(%to, %error, "a UPnP search is not sent");
            }
        }
    }
    let mut buffer = [0; 2048];
    loop {
        let (len, from) = socket.recv_from(&mut buffer).await?;
        if from.ip() == IpAddr::V4(router.address)
            && let Some(location) = location(&buffer[..len])
        {
            return Ok(location);
        }
    }
}

/// Where the answer of a router says that its description is.
fn location(answer: &[u8]) -> Option<Uri> {
    let text = std::str::from_utf8(answer).ok()?;
    let mut lines = text.lines();
    let status = lines.next()?;
    if !status.starts_with("HTTP/") || status.split(' ').nth(1) != Some("200") {
        return None;
    }
    let headers: Vec<(&str, &str)> = lines.filter_map(|line| line.split_once(':')).collect();
    let value = |name: &str| {
        headers.iter().find(|(key, _)| key.trim().eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    };
    value("st")?.contains(":InternetGatewayDevice:").then_some(())?;
    let location: Uri = value("location")?.parse().ok()?;
    (location.scheme_str() == Some("http")).then_some(location)
}

/// Neither a document type nor entities are read.
fn parse(text: &str) -> Result<Document<'_>, roxmltree::Error> {
    Document::parse_with_options(text, ParsingOptions { nodes_limit: MAX_NODES, ..ParsingOptions::default() })
}

fn text<'a>(node: Node<'a, '_>, name: &str) -> Option<&'a str> {
    node.descendants().find(|child| child.tag_name().name() == name)?.text().map(str::trim)
}

/// The services of a description that map ports, the best first.
fn services(description: &str, at: SocketAddrV4, path: &str) -> Result<Vec<Service>, UpnpError> {
    let document = parse(description).map_err(strange)?;
    // Old descriptions say what their paths are relative to.
    let base = text(document.root(), "URLBase").filter(|base| !base.is_empty()).unwrap_or(path);
    let mut found = Vec::new();
    for node in document.descendants().filter(|node| node.tag_name().name() == "service") {
        let kind = text(node, "serviceType").and_then(|kind| SERVICES.iter().find(|known| **known == kind));
        if let (Some(kind), Some(control)) = (kind, text(node, "controlURL"))
            && let Some((port, path)) = resolve(base, control)
        {
            let address = SocketAddrV4::new(*at.ip(), port.unwrap_or(at.port()));
            found.push(Service { kind, address, path });
        }
    }
    found.sort_by_key(|service| SERVICES.iter().position(|known| *known == service.kind));
    found.truncate(MAX_SERVICES);
    Ok(found)
}

/// A reference against its base: path, and the port if one is named.
fn resolve(base: &str, reference: &str) -> Option<(Option<u16>, String)> {
    let of = |uri: &Uri| {
        let port = uri.host().is_some().then(|| uri.port_u16().unwrap_or(80));
        (port, uri.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string))
    };
    if reference.starts_with("http://") {
        return reference.parse().ok().map(|uri| of(&uri));
    }
    let (port, path) = of(&base.parse().ok()?);
    if reference.starts_with('/') {
        return Some((port, reference.to_owned()));
    }
    let folder = path.split('?').next()?.rsplit_once('/').map_or("", |(folder, _)| folder);
    Some((port, format!("{folder}/{reference}")))
}

/// Where the commands of a description would go; for damaged ones.
#[cfg(test)]
pub(super) fn addresses(text: &str, at: SocketAddrV4) -> Vec<SocketAddrV4> {
    let _ = (location(text.as_bytes()), refusal(text));
    let found = services(text, at, "/igd/root.xml").unwrap_or_default();
    found.into_iter().map(|service| service.address).collect()
}

async fn exchange(
    to: SocketAddrV4,
    fwmark: Option<u32>,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: String,
) -> Result<(StatusCode, String), UpnpError> {
    let mut request = Request::builder().method(method).uri(path).header(HOST, to.to_string());
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(Bytes::from(body))).map_err(strange)?;
    let answer = timeout(EXCHANGE, marked::http(to.into(), fwmark, request)).await??;
    Ok((answer.status(), String::from_utf8_lossy(answer.body()).into_owned()))
}

impl Service {
    /// Carries out a command and gives the answer's XML.
    async fn call(
        &self,
        fwmark: Option<u32>,
        action: &str,
        arguments: &[(&str, &str)],
    ) -> Result<String, UpnpError> {
        let header = format!("\"{}#{action}\"", self.kind);
        let headers =
            [(CONTENT_TYPE.as_str(), "text/xml; charset=\"utf-8\""), ("SOAPAction", header.as_str())];
        let body = envelope(self.kind, action, arguments);
        let (status, answer) =
            exchange(self.address, fwmark, Method::POST, &self.path, &headers, body).await?;
        match refusal(&answer) {
            Some(refused) => Err(UpnpError::Refused(refused)),
            None if status == StatusCode::OK => Ok(answer),
            None => Err(strange(format!("status {status}"))),
        }
    }

    /// The router's address on the far side.
    pub(super) async fn external_ip(&self, fwmark: Option<u32>) -> Result<Ipv4Addr, UpnpError> {
        let answer = self.call(fwmark, "GetExternalIPAddress", &[]).await?;
        let document = parse(&answer).map_err(strange)?;
        let ip = text(document.root(), "NewExternalIPAddress").and_then(|ip| ip.parse::<Ipv4Addr>().ok());
        ip.filter(|ip| super::is_possible(*ip)).ok_or_else(|| strange("it has no external address"))
    }

    /// Maps `port`; gives the external one. `wish` is the one there was before.
    pub(super) async fn map(
        &self,
        router: Router,
        fwmark: Option<u32>,
        port: u16,
        wish: Option<u16>,
    ) -> Result<u16, UpnpError> {
        let mut external = wish.unwrap_or(port).max(1024);
        let mut lease = LEASE;
        for _ in 0..TRIES {
            match self.add(router, fwmark, port, external, lease).await {
                Ok(()) => return Ok(external),
                Err(UpnpError::Refused(CONFLICT)) => external = super::random_port(),
                Err(UpnpError::Refused(refused)) if PERMANENT_ONLY.contains(&refused) && !lease.is_zero() => {
                    lease = Duration::ZERO;
                }
                Err(error) => return Err(error),
            }
        }
        Err(UpnpError::Refused(CONFLICT))
    }

    async fn add(
        &self,
        router: Router,
        fwmark: Option<u32>,
        port: u16,
        external: u16,
        lease: Duration,
    ) -> Result<(), UpnpError> {
        let (external, port) = (external.to_string(), port.to_string());
        let (own, lease) = (router.own.to_string(), lease.as_secs().to_string());
        let arguments = [
            ("NewRemoteHost", ""),
            ("NewExternalPort", external.as_str()),
            ("NewProtocol", "UDP"),
            ("NewInternalPort", port.as_str()),
            ("NewInternalClient", own.as_str()),
            ("NewEnabled", "1"),
            ("NewPortMappingDescription", DESCRIPTION),
            ("NewLeaseDuration", lease.as_str()),
        ];
        self.call(fwmark, "AddPortMapping", &arguments).await.map(drop)
    }

    pub(super) async fn unmap(&self, fwmark: Option<u32>, external: u16) -> Result<(), UpnpError> {
        let external = external.to_string();
        let arguments =
            [("NewRemoteHost", ""), ("NewExternalPort", external.as_str()), ("NewProtocol", "UDP")];
        self.call(fwmark, "DeletePortMapping", &arguments).await.map(drop)
    }
}

/// A command in SOAP. All values are our own: none needs escaping.
fn envelope(service: &str, action: &str, arguments: &[(&str, &str)]) -> String {
    let arguments: Vec<_> =
        arguments.iter().map(|(name, value)| format!("<{name}>{value}</{name}>")).collect();
    let arguments = arguments.concat();
    format!(
        "<?xml version=\"1.0\"?>\r\n\
         <s:Envelope xmlns:s=\"http://schemas.xmlsoap.org/soap/envelope/\" \
         s:encodingStyle=\"http://schemas.xmlsoap.org/soap/encoding/\"><s:Body>\
         <u:{action} xmlns:u=\"{service}\">{arguments}</u:{action}></s:Body></s:Envelope>\r\n"
    )
}

/// The error code of a SOAP fault.
fn refusal(answer: &str) -> Option<Refused> {
    let document = parse(answer).ok()?;
    text(document.root(), "errorCode")?.parse().ok().map(Refused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    const AT: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 168, 1, 1), 5000);

    fn description(extra: &str, kind: &str, control: &str) -> String {
        format!(
            "<?xml version=\"1.0\"?><root xmlns=\"urn:schemas-upnp-org:device-1-0\">{extra}<device><serviceList>\
             <service><serviceType>urn:schemas-upnp-org:service:Layer3Forwarding:1</serviceType>\
             <controlURL>/no</controlURL></service></serviceList><deviceList><device><serviceList><service>\
             <serviceType>{kind}</serviceType><controlURL>{control}</controlURL></service></serviceList></device>\
             </deviceList></device></root>"
        )
    }

    #[test]
    fn only_a_router_tells_where_it_describes_itself() {
        let answer = |st: &str, location: &str| {
            format!(
                "HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\nST: {st}\r\nLocation: {location}\r\n\r\n"
            )
        };
        let found = location(answer(DEVICES[0], "http://192.168.1.1:5000/root.xml").as_bytes()).unwrap();
        assert_eq!((found.port_u16(), found.path()), (Some(5000), "/root.xml"));
        let media = "urn:schemas-upnp-org:device:MediaServer:1";
        assert_eq!(location(answer(media, "http://192.168.1.1/").as_bytes()), None);
        assert_eq!(location(answer(DEVICES[0], "https://192.168.1.1/").as_bytes()), None);
        assert_eq!(location(b"NOTIFY * HTTP/1.1\r\n\r\n"), None);
        assert_eq!(location(&[0xff; 9]), None);
    }

    #[test]
    fn services_are_found_wherever_their_commands_go() {
        let one = |extra: &str, control: &str| {
            let text = description(extra, SERVICES[1], control);
            let found = services(&text, AT, "/igd/root.xml?x=/y").unwrap();
            assert_eq!(found.len(), 1);
            (found[0].address.to_string(), found[0].path.clone())
        };
        let at = |port: u16, path: &str| (format!("192.168.1.1:{port}"), path.to_owned());
        assert_eq!(one("", "/ctl/IPConn"), at(5000, "/ctl/IPConn"));
        assert_eq!(one("", "ctl"), at(5000, "/igd/ctl"));
        // Whatever host is named, the router is asked.
        assert_eq!(one("", "http://10.9.9.9:49000/c?d"), at(49000, "/c?d"));
        assert_eq!(one("<URLBase>http://10.9.9.9:81/b/</URLBase>", "c"), at(81, "/b/c"));
        assert_eq!(services(&description("", "urn:other", "/x"), AT, "/").unwrap(), []);
        assert!(services("<no", AT, "/").is_err());
    }

    #[test]
    fn a_description_decides_neither_memory_nor_how_long_is_asked() {
        let service = format!(
            "<service><serviceType>{}</serviceType><controlURL>/c</controlURL></service>",
            SERVICES[0]
        );
        let many = description(&service.repeat(1000), SERVICES[1], "/c");
        assert_eq!(services(&many, AT, "/").unwrap().len(), MAX_SERVICES);
        assert!(services(&format!("<a>{}</a>", "<b/>".repeat(MAX_NODES as usize)), AT, "/").is_err());
        let deep = "<a>".repeat(100_000) + &"</a>".repeat(100_000);
        assert!(services(&deep, AT, "/").is_err());
        assert!(services("<!DOCTYPE a [<!ENTITY b \"c\">]><a>&b;</a>", AT, "/").is_err());
    }

    #[test]
    fn a_fault_is_told_by_its_number() {
        let fault = "<s:Envelope xmlns:s=\"e\"><s:Body><s:Fault><detail><UPnPError xmlns=\"u\">\
                     <errorCode>718</errorCode></UPnPError></detail></s:Fault></s:Body></s:Envelope>";
        assert_eq!(refusal(fault), Some(CONFLICT));
        assert_eq!(refusal("<ok/>"), None);
    }

    /// Answers each request with the next of these.
    async fn router(
        answers: Vec<(&'static str, String)>,
    ) -> (SocketAddrV4, tokio::task::JoinHandle<Vec<String>>) {
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let task = tokio::spawn(async move {
            let mut asked = Vec::new();
            for (status, body) in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                while !String::from_utf8_lossy(&request).contains("</s:Envelope>") {
                    assert_ne!(stream.read_buf(&mut request).await.unwrap(), 0);
                }
                let answer = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                stream.write_all(answer.as_bytes()).await.unwrap();
                asked.push(String::from_utf8(request).unwrap());
            }
            asked
        });
        (SocketAddrV4::new(Ipv4Addr::LOCALHOST, port), task)
    }

    #[tokio::test]
    async fn a_taken_port_and_a_router_without_leases_are_no_obstacles() {
        let fault = |code: u16| ("500 Error", format!("<f><errorCode>{code}</errorCode></f>"));
        let (address, asked) = router(vec![fault(725), fault(718), ("200 OK", "<done/>".into())]).await;
        let service = Service { kind: SERVICES[1], address, path: "/ctl".into() };
        let router = Router { address: *address.ip(), own: Ipv4Addr::LOCALHOST, pcp_port: 0 };
        let external = service.map(router, None, 41641, Some(2000)).await.unwrap();
        let asked = asked.await.unwrap();
        assert!(asked[0].starts_with("POST /ctl HTTP/1.1\r\n"), "{}", asked[0]);
        assert!(asked[0].contains("<NewExternalPort>2000</NewExternalPort>"), "{}", asked[0]);
        assert!(asked[0].contains("<NewLeaseDuration>7200</NewLeaseDuration>"), "{}", asked[0]);
        assert!(asked[1].contains("<NewLeaseDuration>0</NewLeaseDuration>"), "{}", asked[1]);
        assert!(asked[2].contains(&format!("<NewExternalPort>{external}</NewExternalPort>")), "{}", asked[2]);
        assert!(external >= 1024);
    }

    #[tokio::test]
    async fn the_external_address_is_read() {
        let body = |ip: &str| format!("<r><NewExternalIPAddress>{ip}</NewExternalIPAddress></r>");
        let (address, _) = router(vec![("200 OK", body("198.51.100.1")), ("200 OK", body("0.0.0.0"))]).await;
        let service = Service { kind: SERVICES[0], address, path: "/ctl".into() };
        assert_eq!(service.external_ip(None).await.unwrap(), Ipv4Addr::new(198, 51, 100, 1));
        assert!(service.external_ip(None).await.is_err());
    }
}
