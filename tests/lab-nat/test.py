"""Measures each router: does its mapping depend on the destination, whom does it let in, what does it block?"""

import json

# Two of these are outside, at `here` and `there`. A request says who is to answer: this socket, the same host from
# another port, or the other host. The answer has the address that the request came from.
REFLECTOR = """
import selectors, socket, sys
other = sys.argv[1]
sockets = {}
waiting = selectors.DefaultSelector()
for port in (5000, 5001):
    sockets[port] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
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


inside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
inside.settimeout(0.3)
inside.connect((here, 5000))
own = inside.getsockname()[0]
inside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
inside.settimeout(0.3)
inside.bind(("", 4000))
first, second = ask(inside, here, "same"), ask(inside, there, "same")
fresh = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
fresh.settimeout(0.3)
fresh.bind(("", 4001))
ask(fresh, here, "same")
print(json.dumps({
    "translated": first is not None and first.split()[0] != own,
    "answered": first is not None,
    "same mapping": first == second,
    "from another port": ask(fresh, here, "port") is not None,
    "from another host": ask(fresh, here, "host") is not None,
}))
"""


def found(translated, same_mapping, another_port, another_host):
    return {
        "translated": translated,
        "answered": True,
        "same mapping": same_mapping,
        "from another port": another_port,
        "from another host": another_host,
    }


WANTED = {
    "in-open": (in_open, found(False, True, True, True)),
    "in-firewall": (in_firewall, found(False, True, False, False)),
    "in-cone": (in_cone, found(True, True, False, False)),
    "in-symmetric": (in_symmetric, found(True, False, False, False)),
    "in-restricted": (in_restricted, found(True, True, True, False)),
    "in-full": (in_full, found(True, True, True, True)),
    "in-behind": (in_behind, found(True, False, False, False)),
}

start_all()

with subtest("two reflectors are outside"):
    outside = {}
    for name, machine in (("here", here), ("there", there)):
        outside[name] = machine.succeed("hostname -I").split()[0]
    for machine, other in ((here, outside["there"]), (there, outside["here"])):
        machine.succeed(f"cat > /tmp/reflector.py <<'END'\n{REFLECTOR}\nEND")
        machine.succeed(f"python3 /tmp/reflector.py {other} > /tmp/reflector.log 2>&1 &")
        machine.wait_until_succeeds("grep ready /tmp/reflector.log", timeout=10)

probe = f"python3 /tmp/probe.py {outside['here']} {outside['there']}"
for name, (machine, wanted) in WANTED.items():
    with subtest(f"{name.removeprefix('in-')} maps and filters as it is called"):
        machine.succeed(f"cat > /tmp/probe.py <<'END'\n{PROBE}\nEND")
        measured = json.loads(machine.succeed(probe, timeout=20))
        assert measured == wanted, f"{name}: {measured}, not {wanted}"

with subtest("where UDP is blocked nothing comes back, but TCP and the name server work"):
    in_noudp.succeed(f"cat > /tmp/probe.py <<'END'\n{PROBE}\nEND")
    assert not json.loads(in_noudp.succeed(probe, timeout=20))["answered"]
    here.succeed("python3 -m http.server 80 > /dev/null 2>&1 &", "python3 -m http.server 443 > /dev/null 2>&1 &")
    here.wait_for_open_port(80, timeout=10)
    here.wait_for_open_port(443, timeout=10)
    in_noudp.succeed(f"curl -fsS -o /dev/null -m 5 http://{outside['here']}/")
    in_noudp.succeed("dig +tries=1 +time=2 nobody.example.org | grep NXDOMAIN")

with subtest("where only TCP 443 is left, that is all there is"):
    in_only443.succeed(f"curl -fsS -o /dev/null -m 5 http://{outside['here']}:443/")
    in_only443.fail(f"curl -fsS -o /dev/null -m 2 http://{outside['here']}/")
    in_only443.fail(f"ping -c 1 -W 1 {outside['here']}")
