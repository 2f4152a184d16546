"""The policy changes while alice pings web and has a TCP connection open: everybody follows, soon."""

import json
import re

URL = "https://mesh.example.org"
# Seconds until everybody follows.
SOON = 2
# The network whose policy is in the database.
LAB = "--tailnet lab"

# Both ends of a TCP connection on port 7000: a byte comes back every twentieth of a second; what came is written down.
SERVER = """
import socket
connection = socket.create_server(("", 7000)).accept()[0]
while data := connection.recv(100):
    connection.sendall(data)
"""
CLIENT = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 7000), 10)
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while True:
    connection.sendall(b".")
    connection.recv(100)
    print(time.time(), flush=True)
    time.sleep(0.05)
"""


def admin(command):
    return hub.succeed(f"lacis admin {LAB} {command}", timeout=20)


def change(*grants, **more):
    return lambda: set_policy(hub, policy(*grants, **more), LAB)


def policy(*grants, **more):
    """A policy of these grants, each of who, whom and what."""
    listed = [{"src": [src], "dst": [dst], "ip": list(ip)} for src, dst, *ip in grants]
    return {"tagOwners": {"tag:web": ["alice@"]}, "grants": listed, **more}


def refused(text, *words, where=None):
    """The coordinator does not take a policy, says why and where, and keeps the old one."""
    old = admin("policy get")
    put(hub, "/tmp/broken.hujson", text)
    said = hub.fail(f"lacis admin policy set {LAB} /tmp/broken.hujson 2>&1", timeout=10)
    log.info("\n".join(f"      {line}" for line in said.strip().splitlines()))
    for word in words:
        assert word in said, f"{word!r} is not in what is said: {said}"
    if where:
        line, column = where
        assert re.search(rf"\b{line}(:|, column ){column}\b", said), f"line {line}, column {column} is not named: {said}"
    assert admin("policy get") == old, "the old policy is another one now"


def worst_gap(since):
    """The longest time without a byte on alice's connection."""
    times = [since, *(when for when in map(float, alice.succeed("cat /tmp/client.log").split()) if when > since)]
    return max(after - before for before, after in zip(times, [*times[1:], clock(alice)]))


start_all()

with subtest("two people and a server join"):
    hub.wait_for_unit("lacis-coordinator.service", timeout=30)
    for name in ("alice", "bob"):
        admin(f"users create {name}")
    MACHINES = {"alice": alice, "bob": bob, "web": web}
    open_to_all = policy(("*", "*", "*"))
    set_policy(hub, open_to_all, LAB)
    for name, machine in MACHINES.items():
        enter(hub, URL, machine, key=f"{LAB} --tags tag:web" if name == "web" else f"{LAB} --user {name}")
    for name, machine in MACHINES.items():
        wait_for(lambda: peers(machine).keys() == MACHINES.keys() - {name}, f"{name} knows the others")
    assert json.loads(admin("policy get")) == open_to_all
    for machine in MACHINES.values():
        mirror(machine)
    host = web.succeed("lacis ip -4").strip()
    alice.succeed("lacis ping web", timeout=30)

with subtest("alice pings web, and has a TCP connection to it"):
    put(web, "/tmp/server.py", SERVER)
    put(alice, "/tmp/client.py", CLIENT)
    web.succeed("python3 /tmp/server.py > /tmp/server.log 2>&1 &")
    web.wait_until_succeeds("ss -ltn | grep -w 7000", timeout=10)
    alice.succeed(f"python3 /tmp/client.py {host} > /tmp/client.log 2>&1 &")
    alice.succeed(f"ping -i 0.1 {host} > /tmp/ping.log 2>&1 & echo $! > /tmp/ping.pid")
    alice.wait_until_succeeds("test $(wc -l < /tmp/client.log) -gt 20", timeout=10)
    began = clock(alice)

# What stays open all the time.
steady = ("*", "tag:web", "icmp:*", "tcp:7000")

with subtest("a port is cut and opened again, three times"):
    for _ in range(3):
        cut = lambda: not reaches(alice, host, limit=0.3)
        within(SOON, change(steady), cut, "port 8000 is closed")
        again = lambda: reaches(alice, host, limit=0.3)
        within(SOON, change(steady, ("*", "tag:web", "tcp:8000")), again, "port 8000 is open")

with subtest("for one person and not for the other"):
    within(SOON, change(steady, ("bob@", "tag:web", "tcp:8000")), lambda: not reaches(alice, host, limit=0.3), "alice is shut out")
    assert reaches(bob, host)

with subtest("whom no rule joins is not seen"):
    for this, other in ((alice, "bob"), (bob, "alice"), (web, "nobody")):
        assert other not in peers(this)
    assert {"alice", "bob"} == peers(web).keys()
    within(SOON, change(("alice@", "tag:web", "icmp:*", "tcp:7000")), lambda: not peers(bob), "bob is alone")
    within(SOON, lambda: None, lambda: "bob" not in peers(web), "web does not see bob")
    bob.fail(f"ping -c 1 -W 1 {host}")
    alice.fail("lacis status | grep -w bob")
    within(SOON, change(steady, ("bob@", "alice@", "tcp:8000")), lambda: "bob" in peers(alice), "alice sees bob")
    wait_for(lambda: "alice" in peers(bob), "bob sees alice")
    wait_for(lambda: reaches(bob, alice.succeed("lacis ip -4").strip()), "bob reaches alice")
    assert not reaches(alice, bob.succeed("lacis ip -4").strip()), "alice reaches bob, and only he may her"

with subtest("a broken policy is refused with line and column"):
    refused('{\n  "grants": [\n    { "src": ["*"], "dst": ["*"] "ip": ["*"] }\n  ]\n}\n', where=(3, 33))
    refused('{\n  "grants": [\n    { "src": ["group:none"], "dst": ["*"], "ip": ["*"] }\n  ]\n}\n', "group:none", where=(3, 15))
    refused('{\n  "grant": []\n}\n', "grant", where=(2, 3))

with subtest("a policy whose own tests fail is refused"):
    failing = policy(steady, tests=[{"src": "bob@", "accept": ["tag:web:7000"], "deny": ["tag:web:7000"]}])
    refused(json.dumps(failing, indent=1), "tag:web:7000")
    passing = policy(steady, tests=[{"src": "bob@", "accept": ["tag:web:7000"], "deny": ["tag:web:8000"]}])
    set_policy(hub, passing, LAB)
    assert json.loads(admin("policy get")) == passing

with subtest("comments and commas are kept as they were written"):
    text = '// For us.\n{\n  "tagOwners": { "tag:web": ["alice@"] },\n  "grants": [\n'
    text += '    { "src": ["*"], "dst": ["tag:web"], "ip": ["icmp:*", "tcp:7000"] }, // and that is all\n  ],\n}\n'
    put(hub, "/tmp/policy.hujson", text)
    admin("policy set /tmp/policy.hujson")
    assert admin("policy get").strip() == text.strip()

with subtest("the coordinator restarts: the policy stays"):
    hub.systemctl("restart lacis-coordinator.service")
    hub.wait_for_unit("lacis-coordinator.service", timeout=30)
    assert admin("policy get").strip() == text.strip()
    assert not reaches(alice, host)
    change(steady, ("*", "tag:web", "tcp:8000"))()
    wait_for(lambda: reaches(alice, host), "port 8000 is open", timeout=60)

with subtest("the ping and the TCP connection lived through all that"):
    gap = worst_gap(began)
    alice.succeed("kill $(cat /tmp/ping.pid)")
    numbers = list(map(int, re.findall(r"icmp_seq=(\d+)", alice.succeed("cat /tmp/ping.log"))))
    lost = sorted(set(range(1, numbers[-1])) - set(numbers))
    log.info(f"      {len(numbers)} pings answered, {len(lost)} lost; no byte for {gap:.2f} s at most")
    assert not lost, f"lost: {lost}"
    assert gap < 1, f"no byte for {gap:.2f} s"

with subtest("a tag is had by whom the policy lets have it, and by whom an administrator gives it"):
    wish = "--advertise-tags=tag:web"
    key = json.loads(admin("keys create --user bob --json"))["key"]
    bob.succeed(f"umask 077; printf %s {key} > /tmp/auth-key")
    said = bob.fail(f"lacis up --login-server={URL} --auth-key=file:/tmp/auth-key --timeout=10s {wish} 2>&1", timeout=20)
    assert "tag:web" in said, said
    log.info(f"      {said.strip()}")
    enter(hub, URL, alice, key=f"{LAB} --user alice", flags=wish)
    assert status(alice)["Self"]["Tags"] == ["tag:web"]
    enter(hub, URL, bob, key=f"{LAB} --user bob", flags="--reset --force-reauth")
    wait_for(lambda: "alice" in peers(bob), "bob sees alice, as the policy says of tag:web")
    bob4, web4 = (machine.succeed("lacis ip -4").strip() for machine in (bob, web))
    assert not reaches(web, bob4)
    within(SOON, lambda: admin("nodes tag bob --tags tag:web"), lambda: reaches(web, bob4, limit=0.3), "web reaches bob")

# ---- a policy that is a file ----


def file_policy(text):
    """Replaces the file in one step, and reloads the coordinator; whether that worked."""
    put(hub, "/etc/lacis/policy.new", text)
    hub.succeed("mv -f /etc/lacis/policy.new /etc/lacis/policy.hujson")
    return hub.systemctl("reload lacis-coordinator.service")[0] == 0


with subtest("alice and web move to the network whose policy is a file"):
    hub.succeed("lacis admin users create --tailnet filed alice")
    for machine in (alice, web):
        machine.succeed("lacis logout", timeout=20)
        enter(hub, URL, machine, key="--tailnet filed --user alice")
    wait_for(lambda: "web" in peers(alice), "alice sees web")
    host = web.succeed("lacis ip -4").strip()
    wait_for(lambda: reaches(alice, host), "alice reaches web")

with subtest("a changed file is followed on reload"):
    for _ in range(2):
        closing = lambda: file_policy('{ "acls": [ { "action": "accept", "src": ["*"], "dst": ["*:7000"] } ] }')
        within(SOON, closing, lambda: not reaches(alice, host, limit=0.3), "port 8000 is closed")
        opening = lambda: file_policy('{ "acls": [ { "action": "accept", "src": ["*"], "dst": ["*:7000,8000"] } ] }')
        within(SOON, opening, lambda: reaches(alice, host, limit=0.3), "port 8000 is open")

with subtest("a broken file changes nothing, the reload fails, and the coordinator says what is wrong"):
    assert not file_policy('{\n  "acls": [ { "action": "accept", "src": ["*"], "dst": ["*:*" } ]\n}\n')
    hub.wait_until_succeeds("journalctl -u lacis-coordinator | grep -E 'policy.hujson.*2(:|, column )[0-9]+'", timeout=10)
    assert reaches(alice, host)
    failing = '{ "acls": [], "tests": [{ "src": "alice@", "accept": ["alice@:7000"] }] }'
    assert not file_policy(failing), "its own tests fail"
    assert file_policy('{ "acls": [] }')
    wait_for(lambda: not reaches(alice, host, limit=0.3), "nothing is allowed")
