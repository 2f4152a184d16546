"""Measures each router: does its mapping depend on the destination, whom does it let in, what does it block?"""

import json
from concurrent.futures import ThreadPoolExecutor

# Two of these are outside, at `here` and `there`. A request says who is to answer: this socket, the same host from
# another port, or the other host. The answer has the address that the request came from.
REFLECTOR = """
import selectors, socket, sys
other = sys.argv[1]
sockets = {}
waiting = selectors.DefaultSelector()
family = socket.AF_INET6 if ":" in other else socket.AF_INET
for port in (5000, 5001):
    sockets[port] = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        sockets[port].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sockets[port].bind(("", port))
    waiting.register(sockets[port], selectors.EVENT_READ)
print("ready", flush=True)
while True:
    for key, _ in waiting.select():
        request, source = key.fileobj.recvfrom(2048)
        words = request.decode().split()
        if words[0] == "same":
            key.fileobj.sendto(f"{source[0]} {source[1]}".encode(), source)
        elif words[0] == "port":
            sockets[5001].sendto(b"port", source)
        elif words[0] == "host":
            sockets[5000].sendto(f"answer {source[0]} {source[1]}".encode(), (other, 5000))
        elif words[0] == "answer":
            sockets[5000].sendto(b"host", (words[1], int(words[2])))
"""
# What a host inside finds out; JSON on standard output.
PROBE = """
import json, socket, sys
here, there = sys.argv[1:]


def ask(inside, to, request):
    # Datagrams inside one machine are not lost, but a first one may wait for a neighbour's address.
    for _ in range(3):
        inside.sendto(request.encode(), (to, 5000))
        try:
            return inside.recv(2048).decode()
        except TimeoutError:
            pass
    return None


def opened(port):
    made = socket.socket(socket.AF_INET6 if ":" in here else socket.AF_INET, socket.SOCK_DGRAM)
    made.settimeout(0.3)
    made.bind(("", port))
    return made


def hairpin(address):
    # One socket inside sends to the other by its address outside.
    if address is None:
        return False
    while True:
        try:
            inside.recv(2048)
        except TimeoutError:
            break
    opened(4002).sendto(b"hairpin", (address.split()[0], int(address.split()[1])))
    try:
        return inside.recv(2048) == b"hairpin"
    except TimeoutError:
        return False


inside = opened(0)
inside.connect((here, 5000))
own = inside.getsockname()[0]
inside = opened(4000)
first, second = ask(inside, here, "same"), ask(inside, there, "same")
fresh = opened(4001)
ask(fresh, here, "same")
print(json.dumps({
    "translated": first is not None and first.split()[0] != own,
    "answered": first is not None,
    "same mapping": first == second,
    "from another port": ask(fresh, here, "port") is not None,
    "from another host": ask(fresh, here, "host") is not None,
    "hairpin": hairpin(first),
    "port": int(first.split()[1]) if first else 0,
}))
"""


# Asks the router for a port by NAT-PMP, says where that is, and prints what comes in by it.
ASK = """
import socket, struct
inside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
inside.bind(("", 4100))
inside.settimeout(5)
with open("/proc/net/route") as routes:
    gateway = next(line.split()[2] for line in routes if line.split()[1] == "00000000")
router = (socket.inet_ntoa(struct.pack("<I", int(gateway, 16))), 5351)
inside.sendto(struct.pack("!BB", 0, 0), router)
address = socket.inet_ntoa(inside.recv(64)[8:12])
inside.sendto(struct.pack("!BBHHHI", 0, 1, 0, 4100, 4200, 60), router)
_, _, result, _, _, port, _ = struct.unpack("!BBHIHHI", inside.recv(64))
assert result == 0, result
print("mapped", address, port, flush=True)
print(inside.recv(64).decode(), flush=True)
"""
# Says where this host seems to be, from outside.
SEEN = """
import socket
asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asking.settimeout(2)
asking.sendto(b"same", ("HERE", 5000))
print(asking.recv(64).decode().split()[0])
"""

KEPT = range(4000, 4001)
BLOCK = range(20000, 21000)
ANY = range(1024, 65536)


def found(translated, same_mapping, another_port, another_host, hairpin=False, port=KEPT):
    return {
        "translated": translated,
        "answered": True,
        "same mapping": same_mapping,
        "from another port": another_port,
        "from another host": another_host,
        "hairpin": hairpin,
        "port": port,
    }


WANTED = {
    "in-open": (in_open, found(False, True, True, True, True)),
    "in-firewall": (in_firewall, found(False, True, False, False, True)),
    "in-cone": (in_cone, found(True, True, False, False)),
    "in-ports": (in_ports, found(True, True, False, False, port=BLOCK)),
    "in-symmetric": (in_symmetric, found(True, False, False, False, port=ANY)),
    "in-few": (in_few, found(True, False, False, False, port=BLOCK)),
    "in-restricted": (in_restricted, found(True, True, True, False)),
    "in-full": (in_full, found(True, True, True, True)),
    "in-hairpin": (in_hairpin, found(True, True, True, True, True)),
    "in-mapping": (in_mapping, found(True, True, False, False)),
    "in-behind": (in_behind, found(True, False, False, False, port=ANY)),
}
LIMIT = 1420
# What `ping` puts around its bytes.
HEADERS = {4: 28, 6: 48}


def address(machine, family=4):
    """Its address on the internet."""
    said = machine.succeed(f"ip -{family} -brief address show dev eth0 scope global")
    return said.split()[2].split("/")[0]


def measure(machine, here, there):
    machine.succeed(f"cat > /tmp/probe.py <<'END'\n{PROBE}\nEND")
    return json.loads(machine.succeed(f"python3 /tmp/probe.py {here} {there}", timeout=20))


def passes(machine, size, family=4, fragments=False):
    """Whether an echo of so many bytes, headers included, is answered: the first one may only find out the limit."""
    whole = "dont" if fragments else "do"
    target = outside6["here"] if family == 6 else outside["here"]
    command = f"ping -{family} -M {whole} -s {size - HEADERS[family]} -c 3 -i 0.2 -W 1 {target}"
    return machine.execute(command, timeout=10)[0] == 0


start_all()

with subtest("two reflectors are outside"):
    outside = {"here": address(here), "there": address(there)}
    outside6 = {"here": address(here, 6), "there": address(there, 6)}
    for machine, name in ((here, "there"), (there, "here")):
        machine.succeed(f"cat > /tmp/reflector.py <<'END'\n{REFLECTOR}\nEND")
        for other in (outside[name], outside6[name]):
            machine.succeed(f"python3 /tmp/reflector.py {other} >> /tmp/reflector.log 2>&1 &")
        machine.wait_until_succeeds("test $(grep -c ready /tmp/reflector.log) = 2", timeout=10)

# Most of the time goes into answers that rightly do not come.
with ThreadPoolExecutor(6) as pool:
    found_out = dict(zip(WANTED, pool.map(lambda row: measure(row[0], **outside), WANTED.values())))
for name, (machine, wanted) in WANTED.items():
    with subtest(f"{name.removeprefix('in-')} maps and filters as it is called"):
        measured = found_out[name]
        assert measured.pop("port") in wanted.pop("port"), f"{name}: another port outside"
        assert measured == wanted, f"{name}: {measured}, not {wanted}"

with subtest("a router opens a port that it is asked for, and everybody comes in by it"):
    in_mapping.succeed(f"cat > /tmp/ask.py <<'END'\n{ASK}\nEND")
    in_mapping.succeed("python3 /tmp/ask.py > /tmp/mapped 2>&1 &")
    in_mapping.wait_until_succeeds("grep mapped /tmp/mapped", timeout=10)
    _, at, port = in_mapping.succeed("grep mapped /tmp/mapped").split()
    there.succeed(f"echo hello > /dev/udp/{at}/{port}")
    in_mapping.wait_until_succeeds("grep hello /tmp/mapped", timeout=5)

with subtest("IPv6 passes a stateful firewall where UDP over IPv4 does not"):
    assert not measure(in_six, **outside)["answered"]
    wanted = found(False, True, False, False, True, port=4000)
    assert (measured := measure(in_six, **outside6)) == wanted, measured
    assert passes(in_six, 100)

with subtest("where IPv4 is blocked only IPv6 is left"):
    assert (measured := measure(in_only_six, **outside6)) == wanted, measured
    assert not passes(in_only_six, 100) and passes(in_only_six, 100, 6)

with subtest("a narrow link says what is too big, and takes fragments"):
    for family in (4, 6):
        assert passes(in_narrow, LIMIT, family), family
        assert not passes(in_narrow, LIMIT + 1, family), family
        in_narrow.succeed(f"ip -{family} route get {(outside if family == 4 else outside6)['here']} | grep 'mtu {LIMIT}'")
        assert passes(in_narrow, 1500, family, True), family

with subtest("a silent link loses what is too big without a word"):
    for family in (4, 6):
        assert passes(in_silent, LIMIT, family), family
        assert not passes(in_silent, LIMIT + 1, family), family
        in_silent.fail(f"ip -{family} route get {(outside if family == 4 else outside6)['here']} | grep 'mtu {LIMIT}'")
    assert passes(in_silent, 1500, 4, True), "it makes fragments"
    assert passes(in_silent, 3000, 4, True), "it forwards fragments"

with subtest("and one without fragments loses them too"):
    assert passes(in_whole, LIMIT) and passes(in_whole, LIMIT, 4, True)
    assert not passes(in_whole, 1500, 4, True)
    assert not passes(in_whole, 3000, 4, True)

with subtest("a machine roams when its first link is gone"):
    seen = "python3 /tmp/seen.py"
    roamer.succeed(f"cat > /tmp/seen.py <<'END'\n{SEEN.replace('HERE', outside['here'])}\nEND")
    first = roamer.succeed(seen, timeout=10)
    gateway = roamer.succeed("ip route show default dev eth0").split()[2]
    roamer.succeed("ip link set eth0 down")
    assert roamer.succeed(seen, timeout=10) not in ("", first)
    roamer.succeed(f"ip link set eth0 up && ip route add default via {gateway} dev eth0")
    assert roamer.succeed(seen, timeout=10) == first

with subtest("a script changes a router's rules and forgets its connections"):
    assert measure(in_cone, **outside)["answered"]
    cone.succeed("nft add table ip late")
    cone.succeed("nft 'add chain ip late through { type filter hook forward priority -20; }'")
    cone.succeed("nft add rule ip late through meta l4proto udp drop")
    cone.succeed("conntrack -F")
    assert not measure(in_cone, **outside)["answered"]
    cone.succeed("nft delete table ip late")
    assert measure(in_cone, **outside)["answered"]

with subtest("where UDP is blocked nothing comes back, but TCP and the name server work"):
    assert not measure(in_noudp, **outside)["answered"]
    here.succeed("python3 -m http.server 80 > /dev/null 2>&1 &", "python3 -m http.server 443 > /dev/null 2>&1 &")
    here.wait_for_open_port(80, timeout=10)
    here.wait_for_open_port(443, timeout=10)
    in_noudp.succeed(f"curl -fsS -o /dev/null -m 5 http://{outside['here']}/")
    in_noudp.succeed("dig +tries=1 +time=2 nobody.example.org | grep NXDOMAIN")

with subtest("where only TCP 443 is left, that is all there is"):
    in_only443.succeed(f"curl -fsS -o /dev/null -m 5 http://{outside['here']}:443/")
    in_only443.fail(f"curl -fsS -o /dev/null -m 2 http://{outside['here']}/")
    in_only443.fail(f"ping -c 1 -W 1 {outside['here']}")
