"""Resolvers over HTTPS and TLS, split routes into the mesh's own zones, and questions that come back."""

URL = "https://mesh.example.org"
DOH = "https://dns.example.net/dns-query"
RESOLVER = """
server:
  interface: 0.0.0.0@443
  interface: 0.0.0.0@853
  interface: 0.0.0.0@5300
  https-port: 443
  tls-port: 853
  http-endpoint: "/dns-query"
  tls-service-key: /etc/lacis/tls/key.pem
  tls-service-pem: /etc/lacis/tls/cert.pem
  access-control: 0.0.0.0/0 allow
  username: ""
  chroot: ""
  directory: /tmp
  pidfile: /tmp/unbound.pid
  use-syslog: no
  logfile: /tmp/unbound.log
  log-queries: yes
  module-config: iterator
  local-zone: "example.org." static
  local-zone: "example.net." static
  local-data: "secret.example.net. A 192.0.2.77"
  local-zone: "tls.test." static
  local-data: "www.tls.test. A 192.0.2.78"
  local-zone: "either.test." static
  local-data: "www.either.test. A 192.0.2.79"
  local-zone: "7.64.100.in-addr.arpa." static
  local-data: "9.7.64.100.in-addr.arpa. PTR machine.other.example."
"""
CONFIG = """
server_url: https://mesh.example.org
listen: ["127.0.0.1:8443"]
state_dir: /tmp/c
tailnets: {{ lab: {{ domain: lab.example.org, dns: {{ nameservers: ["{server}"] }} }} }}
"""
# Asks whoever asks it.
DNSMASQ = """dnsmasq --conf-file=/dev/null --port=5300 --listen-address=127.0.0.1 --bind-interfaces --no-resolv --no-hosts \
--server=100.100.100.100 --user=root --pid-file=/tmp/dnsmasq.pid --log-queries --log-facility=/tmp/dnsmasq.log"""


def ask(question, *options):
    """The records in the answer, or its code where that is an error."""
    said = alice.succeed(f"dig @100.100.100.100 +time=5 +tries=1 +noauthority +noadditional {' '.join(options)} {question}", timeout=15)
    code = said.split("status: ")[1].split(",")[0]
    lines = [line.split() for line in said.splitlines() if line and not line.startswith(";")]
    return [line[-1] for line in lines] if code == "NOERROR" else code


def connections(port):
    """Alice's connections to the resolver, with their marks."""
    return alice.succeed(f"ss -Htne state established dst 198.51.100.80:{port}").splitlines()


def health(word):
    return [line for line in status(alice)["Health"] or [] if word in line]


def serve():
    web.succeed("unbound -c /tmp/unbound.conf")
    web.wait_for_open_port(443, timeout=10)


start_all()
put(web, "/tmp/unbound.conf", RESOLVER)
serve()
join(hub, URL, alice)
wait_for(lambda: ask("alice.lab.example.org") != "SERVFAIL", "alice answers names")

with subtest("questions go over HTTPS, on one connection that stays out of the tunnel"):
    assert ask("secret.example.net") == ["192.0.2.77"]
    assert ask("secret.example.net", "+tcp") == ["192.0.2.77"]
    assert ask("nobody.example.net") == "NXDOMAIN"
    assert "192.0.2.77" in alice.succeed("getent ahosts secret.example.net")
    kept = connections(443)
    assert len(kept) == 1 and "fwmark:0x80000" in kept[0], kept
    assert not health("resolver"), status(alice)["Health"]

with subtest("and over TLS, by an address and by a name"):
    assert ask("www.tls.test") == ["192.0.2.78"]
    assert ask("www.tls.test", "TXT") == []
    assert len(connections(853)) == 1
    assert ask("www.either.test") == ["192.0.2.79"], "the second of two resolvers answers"
    wait_for(lambda: health("198.51.100.80:8530"), "the first one is named")

with subtest("another network's part of the mesh's reverse zones is asked for, the rest answered here"):
    own = alice.succeed("lacis ip -4").strip()
    assert ask(f"-x {own}") == ["alice.lab.example.org."]
    assert ask("-x 100.64.7.9") == ["machine.other.example."]
    assert ask("-x 100.64.7.10") == "NXDOMAIN"
    assert ask("-x 100.64.8.9") == "NXDOMAIN"
    assert "100.64.8.9" not in web.succeed("cat /tmp/unbound.log")

with subtest("nothing goes around a resolver that cannot be asked, and it is named until it is back"):
    # The host's own resolver knows this name, and the network's does not.
    assert alice.succeed("dig +short @192.0.2.53 mesh.example.org").strip() == address(hub)
    assert ask("mesh.example.org") == "NXDOMAIN"
    web.succeed("kill $(cat /tmp/unbound.pid)")
    wait_for(lambda: ask("mesh.example.org") == "SERVFAIL", "the resolver is away")
    wait_for(lambda: health(DOH), "the resolver is named")
    assert ask("alice.lab.example.org") == [own]
    serve()
    wait_for(lambda: ask("secret.example.net") == ["192.0.2.77"], "the resolver is back")
    wait_for(lambda: not health(DOH), "the resolver is named no more")

with subtest("a question that comes back is recognised"):
    alice.succeed(DNSMASQ)
    began = time.monotonic()
    assert ask("www.loop.test") == "SERVFAIL"
    assert time.monotonic() - began < 3
    asked = alice.succeed("grep -c 'query.A. www.loop.test' /tmp/dnsmasq.log").strip()
    assert asked == "1", f"asked {asked} times"
    assert health("127.0.0.1:5300") and health("www.loop.test"), status(alice)["Health"]
    assert ask("secret.example.net") == ["192.0.2.77"]
    alice.succeed("kill $(cat /tmp/dnsmasq.pid)")

with subtest("what leads back to each client is refused or warned of"):
    for server, refused, why in (
        ("127.0.0.53", False, "each client's own host"),
        ("100.100.100.100", True, "would ask itself"),
        ("http://dns.example.net/", True, "https://"),
    ):
        put(hub, "/tmp/c.yaml", CONFIG.format(server=server))
        code, said = hub.execute("lacis-coordinator check --config /tmp/c.yaml 2>&1")
        assert server in said and why in said and (code != 0) == refused, said
