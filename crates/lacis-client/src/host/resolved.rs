//! systemd-resolved, over D-Bus: the device gets servers and domains of its own, the rest of the host stays.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use lacis_dns::OsDns;
use zbus::{Connection, as_variant};

use super::repairs::Repairs;
use super::resolv_conf;
use super::resolver::ResolverError;

const SERVICE: &str = "org.freedesktop.resolve1";
/// Where it keeps its files. Something in there changes when it starts and when its servers are others.
pub(super) const FOLDER: &str = "/run/systemd/resolve";
/// All servers that it asks.
const UPLINKS: &str = "resolv.conf";
const PATH: &str = "/org/freedesktop/resolve1";
const INTERFACE: &str = "org.freedesktop.resolve1.Manager";
/// It answers at once or not at all.
const LIMIT: Duration = Duration::from_secs(2);
/// One that is not there is looked for again.
const RETRY: Duration = Duration::from_secs(1);
/// The error of a list that is too long.
const TOO_MANY: &str = "System.Error.E2BIG";
const INET: i32 = 2;
const INET6: i32 = 10;

#[derive(Debug)]
pub(super) struct Resolved {
    bus: Connection,
    /// The device that was set.
    link: Option<i32>,
    /// Its name on the bus when it was told everything. After a restart it has another, and may have forgotten.
    told: Option<String>,
    /// It is not there now: when to look again.
    retry: Option<Instant>,
    repairs: Repairs,
}

impl Resolved {
    pub(super) async fn connect() -> Result<Self, ResolverError> {
        let connected = tokio::time::timeout(LIMIT, async {
            let bus = Connection::system().await?;
            bus.call_method(Some(SERVICE), PATH, Some("org.freedesktop.DBus.Peer"), "Ping", &()).await?;
            Ok::<_, zbus::Error>(bus)
        });
        let bus = connected.await.map_err(|_| late())??;
        Ok(Self::by(bus))
    }

    fn by(bus: Connection) -> Self {
        Self { bus, link: None, told: None, retry: None, repairs: Repairs::default() }
    }

    async fn call<B>(&self, method: &str, body: &B) -> Result<(), ResolverError>
    where
        B: serde::Serialize + zbus::zvariant::DynamicType,
    {
        let call = self.bus.call_method(Some(SERVICE), PATH, Some(INTERFACE), method, body);
        tokio::time::timeout(LIMIT, call).await.map_err(|_| late())??;
        Ok(())
    }

    pub(super) async fn set(&mut self, index: u32, dns: &OsDns) -> Result<(), ResolverError> {
        self.link = Some(index as i32);
        self.tell(index as i32, dns).await
    }

    async fn tell(&mut self, link: i32, dns: &OsDns) -> Result<(), ResolverError> {
        self.told = None;
        self.repairs.wrote(Instant::now());
        // First, so that a restart during what follows is noticed. One that is stopped is started by what follows.
        let owner = self.owner().await.ok();
        let servers: Vec<(i32, Vec<u8>)> = dns
            .servers
            .iter()
            .map(|ip| match ip {
                IpAddr::V4(ip) => (INET, ip.octets().to_vec()),
                IpAddr::V6(ip) => (INET6, ip.octets().to_vec()),
            })
            .collect();
        // Searched ones, then those that only lead here; "." is everything.
        let mut domains: Vec<(String, bool)> =
            dns.search.iter().map(|domain| (domain.clone(), false)).collect();
        let only_routed = dns.match_domains.iter().filter(|domain| !dns.search.contains(domain));
        domains.extend(only_routed.map(|domain| (domain.clone(), true)));
        let takes_all = dns.match_domains.is_empty() && !dns.servers.is_empty();
        if takes_all {
            domains.push((".".to_owned(), true));
        }
        self.call("SetLinkDNS", &(link, servers)).await?;
        match self.call("SetLinkDomains", &(link, &domains)).await {
            // Old versions take few domains. Reverse zones are many, and the first that can be missed.
            Err(ResolverError::Bus(zbus::Error::MethodError(name, ..))) if name == TOO_MANY => {
                domains.retain(|(domain, _)| domain.rsplit('.').next() != Some("arpa"));
                self.call("SetLinkDomains", &(link, &domains)).await?;
            }
            other => other?,
        }
        self.call("SetLinkDefaultRoute", &(link, takes_all)).await?;
        for method in ["SetLinkLLMNR", "SetLinkMulticastDNS", "SetLinkDNSSEC", "SetLinkDNSOverTLS"] {
            // Older versions do not know all of them.
            if let Err(error) = self.call(method, &(link, "no")).await {
                tracing::debug!(%error, method);
            }
        }
        self.call("FlushCaches", &()).await?;
        self.told = owner;
        Ok(())
    }

    /// Who has the service's name on the bus now. Asking the bus itself does not start the service.
    async fn owner(&self) -> Result<String, ResolverError> {
        let bus = "org.freedesktop.DBus";
        let call =
            self.bus.call_method(Some(bus), "/org/freedesktop/DBus", Some(bus), "GetNameOwner", &(SERVICE,));
        let reply = tokio::time::timeout(LIMIT, call).await.map_err(|_| late())??;
        Ok(reply.body().deserialize()?)
    }

    /// Says everything again to a service that was restarted, or to which another program has said something else. One
    /// that is not there gets it when it is back.
    pub(super) async fn repair(&mut self, dns: &OsDns) -> Result<(), ResolverError> {
        let Some(link) = self.link else { return Ok(()) };
        let owner = self.owner().await;
        self.retry = owner.is_err().then(|| Instant::now() + RETRY);
        let Ok(owner) = owner else { return Ok(()) };
        if self.told.as_ref() != Some(&owner) {
            tracing::info!("systemd-resolved was restarted; it is set up for the mesh again");
            return self.tell(link, dns).await;
        }
        let has = self.has(link, dns).await;
        if let Err(error) = &has {
            tracing::debug!(%error, "what systemd-resolved has for the mesh cannot be read");
        }
        if has.unwrap_or(true) {
            self.repairs.stands();
            return Ok(());
        }
        if !self.repairs.is_due(Instant::now()) {
            return Ok(());
        }
        tracing::info!("another program has changed what systemd-resolved has for the mesh; it is set again");
        self.tell(link, dns).await
    }

    /// Does it still have our servers for the device, and domains if there are any?
    async fn has(&self, link: i32, dns: &OsDns) -> Result<bool, ResolverError> {
        let servers: Vec<(i32, i32, Vec<u8>)> = self.property("DNS").await?;
        let servers: Vec<_> =
            servers.into_iter().filter(|server| server.0 == link).map(|server| server.2).collect();
        let octets = |ip: &IpAddr| match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        if servers != dns.servers.iter().map(octets).collect::<Vec<_>>() {
            return Ok(false);
        }
        let domains: Vec<(i32, String, bool)> = self.property("Domains").await?;
        // How it writes a domain is its own matter.
        let wants_some = !(dns.search.is_empty() && dns.match_domains.is_empty());
        Ok(!wants_some || domains.iter().any(|domain| domain.0 == link))
    }

    /// A property of the service; `T` is of its D-Bus type.
    async fn property<T>(&self, name: &str) -> Result<T, ResolverError>
    where
        T: zbus::Type + serde::de::DeserializeOwned,
    {
        let (interface, what) = (Some("org.freedesktop.DBus.Properties"), (INTERFACE, name));
        let call = self.bus.call_method(Some(SERVICE), PATH, interface, "Get", &what);
        let reply = tokio::time::timeout(LIMIT, call).await.map_err(|_| late())??;
        Ok(reply.body().deserialize::<as_variant::Deserialize<'_, T>>()?.0)
    }

    /// When to look again.
    pub(super) fn due(&self) -> Option<Instant> {
        self.retry.into_iter().chain(self.repairs.due()).min()
    }

    /// What the user should know of other programs.
    pub(super) fn complaint(&self) -> Option<String> {
        self.repairs.insists(Instant::now()).then(|| {
            "another program keeps changing what systemd-resolved has for the mesh's device: names of the mesh resolve only now and then. Let it leave the device alone (NetworkManager: unmanaged-devices)".to_owned()
        })
    }

    /// The servers that it asks beside ours.
    pub(super) fn base_resolvers() -> Vec<SocketAddr> {
        let text = std::fs::read_to_string(Path::new(FOLDER).join(UPLINKS)).unwrap_or_default();
        resolv_conf::servers(&text)
    }

    pub(super) async fn revert(&mut self) -> Result<(), ResolverError> {
        match self.link.take() {
            Some(link) => self.call("RevertLink", &(link,)).await,
            None => Ok(()),
        }
    }
}

fn late() -> ResolverError {
    ResolverError::Bus(zbus::Error::Failure("no answer".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead as _, BufReader, Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    use std::sync::{Arc, Mutex};

    use lacis_dns::QUAD100_V4;
    use zbus::connection;
    use zbus::wire::serialized::Context;
    use zbus::wire::{LE, to_bytes};

    const LINK: u32 = 7;

    /// What a stand-in for systemd-resolved has.
    #[derive(Debug, Default)]
    struct Service {
        /// Its name on the bus; empty where it does not run.
        owner: String,
        /// Has the device what it should have?
        is_set: bool,
        sets: usize,
    }

    impl Service {
        /// The answer to a call: signature and body, or nothing for an error.
        fn answer(&mut self, member: &str, body: &[u8]) -> Option<(&'static str, Vec<u8>)> {
            let context = Context::new(LE, 0);
            let link = LINK as i32;
            let text = |text: &str| Some(("s", to_bytes(context, text).unwrap().bytes().to_vec()));
            match member {
                "Hello" => text(":1.9"),
                "GetNameOwner" if self.owner.is_empty() => None,
                "GetNameOwner" => text(&self.owner),
                "Get" if body.ends_with(b"DNS\0") => {
                    let servers = [(link, INET, QUAD100_V4.octets().to_vec()), (9, INET, vec![192, 0, 2, 1])];
                    let servers = &servers[usize::from(!self.is_set)..].to_vec();
                    Some(("v", to_bytes(context, &as_variant::Serialize(servers)).unwrap().bytes().to_vec()))
                }
                "Get" => {
                    let domains = [(link, "lab.example".to_owned(), false)];
                    let domains = &domains[usize::from(!self.is_set)..].to_vec();
                    Some(("v", to_bytes(context, &as_variant::Serialize(domains)).unwrap().bytes().to_vec()))
                }
                "SetLinkDNS" => {
                    (self.is_set, self.sets) = (true, self.sets + 1);
                    Some(("", Vec::new()))
                }
                "RevertLink" => {
                    self.is_set = false;
                    Some(("", Vec::new()))
                }
                _ => Some(("", Vec::new())),
            }
        }
    }

    /// Plays the bus and the service on it: messages as the D-Bus specification has them, all little-endian.
    fn serve(mut stream: UnixStream, service: &Mutex<Service>) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut line = Vec::new();
        while !line.starts_with(b"BEGIN") {
            if line.windows(4).any(|word| word == b"AUTH") {
                stream.write_all(b"OK 0123456789abcdef0123456789abcdef\r\n")?;
            } else if !line.is_empty() {
                stream.write_all(b"AGREE_UNIX_FD\r\n")?;
            }
            line.clear();
            reader.read_until(b'\n', &mut line)?;
        }
        loop {
            let mut head = [0; 16];
            reader.read_exact(&mut head)?;
            let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
            let mut fields = vec![0; word(12).next_multiple_of(8) as usize];
            reader.read_exact(&mut fields)?;
            let mut body = vec![0; word(4) as usize];
            reader.read_exact(&mut body)?;
            let member = fields.windows(4).position(|field| field == b"\x03\x01s\0").unwrap() + 8;
            let member = fields[member..].split(|byte| *byte == 0).next().unwrap();
            let answer = service.lock().unwrap().answer(std::str::from_utf8(member).unwrap(), &body);
            let (kind, signature, body) = match answer {
                Some((signature, body)) => (2, signature, body),
                None => (3, "", Vec::new()),
            };
            let mut fields = [b"\x05\x01u\0".as_slice(), &head[8..12]].concat();
            if kind == 3 {
                fields.extend(b"\x04\x01s\0\x03\0\0\0a.b\0");
            }
            if !signature.is_empty() {
                fields.extend([b"\x08\x01g\0\x01", signature.as_bytes(), b"\0"].concat());
            }
            let mut message = vec![b'l', kind, 1, 1];
            for number in [body.len() as u32, 1, fields.len() as u32] {
                message.extend(number.to_le_bytes());
            }
            message.extend(fields);
            message.resize(message.len().next_multiple_of(8), 0);
            message.extend(body);
            stream.write_all(&message)?;
        }
    }

    async fn resolved() -> (Resolved, Arc<Mutex<Service>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let service = Arc::new(Mutex::new(Service { owner: ":1.1".into(), ..Service::default() }));
        let served = Arc::clone(&service);
        // Ends with an error when the other side is closed.
        std::thread::spawn(move || serve(theirs, &served));
        let bus = connection::Builder::unix_stream(ours).build().await.unwrap();
        (Resolved::by(bus), service)
    }

    fn dns() -> OsDns {
        OsDns {
            servers: vec![QUAD100_V4.into()],
            search: vec!["lab.example".into()],
            match_domains: vec!["lab.example".into(), "64.100.in-addr.arpa".into()],
        }
    }

    #[tokio::test]
    async fn it_is_set_again_after_a_restart_and_after_another_program() {
        let (mut resolved, service) = resolved().await;
        resolved.set(LINK, &dns()).await.unwrap();
        let sets = || service.lock().unwrap().sets;
        assert!(resolved.has(LINK as i32, &dns()).await.unwrap());
        resolved.repair(&dns()).await.unwrap();
        assert_eq!(sets(), 1, "it has everything");

        *service.lock().unwrap() = Service { sets: 1, ..Service::default() };
        resolved.repair(&dns()).await.unwrap();
        assert_eq!(sets(), 1, "it does not run");
        assert!(resolved.due().is_some_and(|due| due <= Instant::now() + RETRY));
        service.lock().unwrap().owner = ":1.2".into();
        resolved.repair(&dns()).await.unwrap();
        assert_eq!(sets(), 2);
        assert!(resolved.due().is_none());

        // `resolvectl revert`, and a program that insists.
        for round in 0..20 {
            service.lock().unwrap().is_set = false;
            assert!(!resolved.has(LINK as i32, &dns()).await.unwrap());
            resolved.repair(&dns()).await.unwrap();
            if resolved.due().is_some() {
                assert!(round > 0, "the first time at once");
                resolved.set(LINK, &dns()).await.unwrap();
            }
        }
        assert!(resolved.complaint().unwrap().contains("another program"));
        resolved.revert().await.unwrap();
        assert!(!service.lock().unwrap().is_set);
    }
}
