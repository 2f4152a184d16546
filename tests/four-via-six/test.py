"""Tills in shops whose networks are alike, each reached by the number of its shop."""

URL = "https://mesh.example.org"
DOMAIN = "lab.example.org"
NET = "10.1.1.0/24"
SOON = 2
EVERYTHING = [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]

# A datagram to a closed port: whoever sends it is told so.
CLOSED = """
import socket, sys
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.settimeout(3)
s.connect((sys.argv[1], 9))
s.send(b"x")
try:
    s.recv(10)
except ConnectionRefusedError:
    print("refused")
"""


def route(site):
    return alice.succeed(f"lacis debug via {site} {NET}").strip()


def name(site, machine):
    return f"{address(machine).replace('.', '-')}-via-{site}"


def via(site, machine):
    """The address that MagicDNS gives for the machine of a site."""
    return alice.succeed(f"dig +short AAAA @100.100.100.100 {name(site, machine)}.{DOMAIN}").strip()


def serve(till, word):
    mirror(till)
    till.succeed(f"mkdir -p /tmp/www && echo {word} > /tmp/www/word && head -c 2M /dev/urandom > /tmp/www/original")
    till.succeed("python3 -m http.server --bind 0.0.0.0 --directory /tmp/www 8080 > /dev/null 2>&1 &")
    till.wait_for_open_port(8080, timeout=10)


def offer(gate, label, site, command="lacis"):
    gate.succeed("echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding")
    gate.succeed(f"{command} set --advertise-routes={route(site)}")
    hub.wait_until_succeeds(f"lacis admin nodes show {label} --json | grep {route(site)}", timeout=10)
    approve = lambda: hub.succeed(f"lacis admin nodes approve-routes {label} --routes {route(site)}", timeout=20)
    within(SOON, approve, lambda: route(site) in routes(alice), f"alice has the route of site {site}")


def use(machine, site, gate, till):
    """Everything that a user does, there and back."""
    host = via(site, till)
    machine.wait_until_succeeds(f"ping -c 1 -W 1 {host}", timeout=20)
    machine.succeed(f"ping -c 2 -i 0.2 -W 5 -s 3000 {host}", timeout=20)
    assert seen_by(host, machine) == address(gate), "the router's own address is seen"
    page = f"http://[{host}]:8080/"
    machine.succeed(f"curl -fsS -m 30 -o /tmp/downloaded {page}original")
    assert machine.succeed("sha256sum < /tmp/downloaded") == till.succeed("sha256sum < /tmp/www/original")
    assert machine.succeed(f"curl -fsS -m 5 {page}word") == f"site {site}\n"


start_all()

with subtest("all join, and the routers offer their networks, which are alike"):
    join(hub, URL, alice, gate7, gate8)
    alice.succeed("lacis set --accept-routes")
    assert route(7) == "fd7a:115c:a1e0:b1a:0:7:a01:100/120"
    assert alice.succeed(f"lacis debug via {route(7)}").strip() == f"site 7 (0x7), {NET}"
    assert "65535" in gate7.fail("lacis set --advertise-routes=fd7a:115c:a1e0:b1a:1:7::/96 2>&1")
    assert address(till7) == address(till8) and address(gate7) == address(gate8)
    for till, site in ((till7, 7), (till8, 8)):
        serve(till, f"site {site}")
    offer(gate7, "gate7", 7)
    offer(gate8, "gate8", 8)

with subtest("names say the address; each till is reached through its router"):
    assert via(7, till7) == "fd7a:115c:a1e0:b1a:0:7:a01:1" + via(7, till7)[-2:]
    assert alice.succeed(f"dig +short A @100.100.100.100 {name(7, till7)}.{DOMAIN}").strip() == ""
    use(alice, 7, gate7, till7)
    use(alice, 8, gate8, till8)
    assert alice.succeed(f"curl -fsS -m 5 http://{name(7, till7)}:8080/word") == "site 7\n"
    assert alice.succeed(f"curl -fsS -m 5 http://{name(8, till8)}.{DOMAIN}:8080/word") == "site 8\n"

with subtest("from one port to the same address at both sites at once"):
    for site, till in ((7, till7), (8, till8), (7, till7)):
        said = alice.succeed(f"curl -fsS -m 8 --local-port 5555 http://[{via(site, till)}]:8080/word")
        assert said == f"site {site}\n", said

with subtest("an upload, and a datagram in fragments"):
    copy(alice, till7, via(7, till7))
    listen = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 6000)); "
    listen += "data, who = s.recvfrom(65535); s.sendto(data[::-1], who)"
    till7.succeed(f'python3 -c "{listen}" > /tmp/listen.log 2>&1 &')
    till7.wait_until_succeeds("ss -lun | grep -w 6000", timeout=10)
    ask = "import socket; s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.settimeout(5); "
    ask += f"data = bytes(range(250)) * 20; s.sendto(data, ('{via(7, till7)}', 6000)); "
    ask += "assert s.recv(65535) == data[::-1]"
    alice.succeed(f'python3 -c "{ask}"', timeout=10)

with subtest("errors come back: a closed port, a host that is not there, a route too long"):
    put(alice, "/tmp/closed.py", CLOSED)
    assert alice.succeed(f"python3 /tmp/closed.py {via(7, till7)}").strip() == "refused"
    absent = via(7, till7).rsplit(":", 1)[0] + ":1fe"
    said = alice.fail(f"ping -c 1 -W 6 {absent} 2>&1", timeout=15)
    assert "nreachable" in said, said
    said = alice.fail(f"ping -c 1 -W 3 -t 1 {via(7, till7)} 2>&1")
    assert "Time exceeded" in said, said

with subtest("what is no host of the site is not reached"):
    for ip in ("127.0.0.1", alice.succeed("lacis ip -4").strip()):
        wrong = alice.succeed(f"lacis debug via 7 {ip}/32").strip().removesuffix("/128")
        assert not reaches(alice, wrong, 8000), ip

with subtest("the policy sees the IPv6 address"):
    only = [
        {"action": "accept", "src": ["*"], "dst": ["autogroup:member:*", f"{via(7, till7)}/128:8000"]},
    ]
    closed = lambda: not reaches(alice, via(7, till7), 8080, limit=0.5)
    within(SOON + 0.5, lambda: set_policy(hub, {"acls": only}), closed, "port 8080 is closed")
    assert reaches(alice, via(7, till7), 8000)
    assert not reaches(alice, via(8, till8), 8000)
    opened = lambda: reaches(alice, via(8, till8), 8080)
    within(SOON, lambda: set_policy(hub, {"acls": EVERYTHING}), opened, "all is open again")

with subtest("a plain route to the same network beside it"):
    plain = lambda: hub.succeed(f"lacis admin nodes approve-routes gate7 --routes {route(7)},{NET}", timeout=20)
    gate7.succeed(f"lacis set --advertise-routes={route(7)},{NET}")
    hub.wait_until_succeeds(f"lacis admin nodes show gate7 --json | grep {NET}", timeout=10)
    within(SOON, plain, lambda: NET in routes(alice), "alice has the plain route")
    for host in (via(7, till7), address(till7), via(7, till7)):
        said = alice.succeed(f"curl -fsS -m 8 --local-port 5556 {url_of(host, 8080)}word")
        assert said == "site 7\n", said

if present("dora"):
    with subtest("tailscaled uses our routers"):
        enter(hub, URL, dora, "tailscale")
        dora.succeed("tailscale set --accept-routes")
        use(dora, 7, gate7, till7)
        use(dora, 8, gate8, till8)

if present("gate9"):
    with subtest("tailscaled is the router"):
        enter(hub, URL, gate9, "tailscale")
        serve(till9, "site 9")
        offer(gate9, "gate9", 9, "tailscale")
        use(alice, 9, gate9, till9)
