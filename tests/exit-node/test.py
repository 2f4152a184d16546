"""Alice's traffic leaves by an exit node: all of it, and none when that is gone."""

import re

URL = "https://mesh.example.org"
# A name that only web's name server knows, and its address.
OUTSIDE, ANSWER = "www.example.net", "192.0.2.80"
# Seconds until a change of routes is seen.
SOON = 2
EXIT = "0.0.0.0/0,::/0"

# A name server that says the same of every name, and notes who asks.
NAMES = f"""
import socket
asked = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
asked.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
asked.bind(("::", 53))
print("ready", flush=True)
while True:
    query, sender = asked.recvfrom(2000)
    print(sender[0].removeprefix("::ffff:"), flush=True)
    end = query.index(0, 12) + 5
    is_a = query[end - 4:end - 2] == b"\\x00\\x01"
    head = query[:2] + b"\\x84\\x00\\x00\\x01" + (b"\\x00\\x01" if is_a else b"\\x00\\x00") + bytes(4)
    record = b"\\xc0\\x0c\\x00\\x01\\x00\\x01\\x00\\x00\\x00\\x05\\x00\\x04" + socket.inet_aton("{ANSWER}")
    asked.sendto(head + query[12:end] + (record if is_a else b""), sender)
"""


def admin(command):
    return hub.succeed(f"lacis admin {command}", timeout=20)


def forwarding(machine, on):
    machine.succeed(f"echo {on} > /proc/sys/net/ipv4/ip_forward; echo {on} > /proc/sys/net/ipv6/conf/all/forwarding")


# Sends to whoever is named, by UDP, every two milliseconds until it is stopped; what is refused is tried again.
FLOOD = """
import itertools, socket, sys, time
ways = [(socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM), ip) for ip in sys.argv[1:]]
print("ready", flush=True)
for n in itertools.count():
    for way, ip in ways:
        try:
            way.sendto(b"?", (ip, 9))
        except OSError:
            pass
    if n % 50 == 0:
        # New sockets ask for the way again.
        for index, (way, ip) in enumerate(ways):
            way.close()
            ways[index] = (socket.socket(way.family, socket.SOCK_DGRAM), ip)
    time.sleep(0.002)
"""
BOTH = "for f in 4 6; do {}; done"
# What other programs sweep away at once.
SWEEPS = {
    "a rule": BOTH.format("ip -$f rule del pref 5270"),
    "the rules": BOTH.format("for p in 5210 5230 5250 5270 5280; do ip -$f rule del pref $p; done"),
    "the table": BOTH.format("ip -$f route flush table 52"),
    "the guard's table": BOTH.format("ip -$f route flush table 5252"),
    "nftables": "nft flush ruleset",
    "the device": "ip link set lacis0 down",
    "the addresses": "ip address flush dev lacis0 scope global",
}


def past():
    """How many packets of home's have gone to web past the exit node."""
    return sum(map(int, re.findall(r"counter packets (\d+)", home.succeed("nft list table inet watch"))))


def askers():
    return set(web.succeed("sed '/ready/d' /tmp/names.log").split())


def resolve(machine):
    """Asks for a name that has not been asked for before; the addresses that web's name server then heard from."""
    web.succeed("echo ready > /tmp/names.log")
    name = f"n{time.time_ns()}.{OUTSIDE}"
    assert machine.succeed(f"dig +short +time=3 @100.100.100.100 {name}", timeout=15).split() == [ANSWER]
    return askers()


def leaves_by(machine, shown):
    """A machine reaches web over IPv4 and IPv6 (by TCP, UDP and ICMP) and is seen there at these addresses."""
    for host, own in zip(webs, shown):
        machine.succeed(f"ping -c 2 -i 0.2 -W 5 {host}", timeout=20)
        assert (seen := seen_by(host, machine)) == own, f"{host} sees {machine.name} at {seen}, not {own}"


def is_cut_off(machine):
    for host in webs:
        assert not reaches(machine, host), f"{machine.name} reaches {host}"
        machine.fail(f"ping -c 1 -W 1 {host}")
    machine.fail(f"dig +short +time=1 +tries=1 @100.100.100.100 n{time.time_ns()}.{OUTSIDE} | grep .")


def host_routes(machine):
    """Everything that decides where packets go, without what comes and goes by itself."""
    lines = machine.succeed("for family in 4 6; do ip -$family rule; ip -$family route show table all; done").splitlines()
    lines = [re.sub(r" (expires|pref|proto|hoplimit) \w+", "", line).strip() for line in lines]
    # The device has another link-local address each time that it is made.
    return sorted(line for line in lines if not line.startswith("local fe80:"))


def use(machine, name, command="lacis"):
    return lambda: machine.succeed(f"{command} set --exit-node={name}")


def restart(machine):
    """Restarts the daemon; a stop puts the host back, so the exit node is in use only when the routes are there again."""
    machine.systemctl("restart lacisd.service")
    machine.wait_for_unit("lacisd.service", timeout=30)
    wait_for(lambda: status(machine)["BackendState"] == "Running", f"{machine.name} runs", timeout=30)
    wait_for(lambda: "default" in routes(machine), f"{machine.name} has its routes again")


start_all()

with subtest("alice and gate join; web is seen by its own ways"):
    put(web, "/tmp/names.py", NAMES)
    web.succeed("python3 -B /tmp/names.py >> /tmp/names.log 2>&1 &")
    web.wait_until_succeeds("grep ready /tmp/names.log", timeout=10)
    mirror(web)
    mirror(printer)
    valid_mark = "cat /proc/sys/net/ipv4/conf/all/src_valid_mark"
    without, mark_without = host_routes(alice), alice.succeed(valid_mark)
    join(hub, URL, alice, gate)
    webs = [address(web), address(web, family=6)]
    by_itself = [address(home, "wan"), address(alice, family=6)]
    by_gate = [address(office, "wan"), address(gate, family=6)]
    leaves_by(alice, by_itself)
    assert resolve(alice) == {by_itself[0]}
    before = host_routes(alice)
    home.succeed(
        "nft add table inet watch",
        "nft 'add chain inet watch forward { type filter hook forward priority -50; }'",
        f"nft add rule inet watch forward ip daddr {webs[0]} counter",
        f"nft add rule inet watch forward ip6 daddr {webs[1]} counter",
    )

with subtest("an exit node without forwarding says so"):
    forwarding(gate, 0)
    said = gate.succeed("lacis set --advertise-exit-node 2>&1; lacis status 2>&1")
    assert "ip_forward" in said, f"nobody says what is missing: {said}"
    forwarding(gate, 1)
    gate.wait_until_fails("lacis status 2>&1 | grep ip_forward", timeout=15)

with subtest("what is advertised is no exit node until it is approved"):
    hub.wait_until_succeeds("lacis admin nodes show gate --json | grep '0.0.0.0/0'", timeout=10)
    assert not peers(alice)["gate"]["ExitNodeOption"]
    said = alice.fail("lacis set --exit-node=gate 2>&1")
    log.info(f"      {said.strip()}")
    leaves_by(alice, by_itself)
    approve = lambda: admin(f"nodes approve-routes gate --routes {EXIT}")
    within(SOON, approve, lambda: peers(alice)["gate"]["ExitNodeOption"], "gate is an exit node")
    # Nobody uses what nobody asked for.
    leaves_by(alice, by_itself)

with subtest("everything goes through the exit node"):
    within(SOON + 1, use(alice, "gate"), lambda: reaches(alice, webs[0], limit=3), "alice reaches web")
    began = past()
    leaves_by(alice, by_gate)
    assert resolve(alice) == {by_gate[0]}
    assert past() == began, f"{past() - began} packets went past the exit node"
    assert peers(alice)["gate"]["ExitNode"]
    log.info(f"      {alice.succeed('lacis status').strip()}")

with subtest("the mesh's own packets do not: the path is direct, the coordinator is heard"):
    alice.succeed("lacis ping gate", timeout=30)
    wait_for(lambda: way(gate, "alice").startswith((f"{by_itself[0]}:", f"[{by_itself[1]}]:")), "gate sees alice at home")
    leaves_by(alice, by_gate)
    copy(alice, web, webs[0])
    hub.systemctl("restart lacis-coordinator.service")
    hub.wait_for_unit("lacis-coordinator.service", timeout=30)
    admin("nodes rename gate portal")
    wait_for(lambda: "portal" in peers(alice), "alice hears of changes", timeout=60)
    admin("nodes rename portal gate")
    wait_for(lambda: "gate" in peers(alice), "alice hears of further changes")
    talking = hub.succeed("ss -Htn state established '( sport = :443 )'")
    assert any(f"{own}]:" in talking or f"{own}:" in talking for own in by_itself), f"nobody talks from home: {talking}"
    leaves_by(alice, by_gate)

with subtest("names of the mesh and of the world"):
    assert alice.succeed("dig +short @100.100.100.100 gate.lab.example.org").split() == [gate.succeed("lacis ip -4").strip()]
    alice.succeed("getent hosts gate")
    assert alice.succeed(f"getent ahostsv4 {OUTSIDE}").startswith(ANSWER)

with subtest("the local network is out of reach, unless it is asked for"):
    for family in (4, 6):
        assert not reaches(alice, address(printer, family=family))
    began = past()
    alice.succeed("lacis set --exit-node-allow-lan-access")
    for family in (4, 6):
        host = address(printer, family=family)
        wait_for(lambda: reaches(alice, host), f"alice reaches {host}")
        assert seen_by(host, alice) == address(alice, family=family)
    leaves_by(alice, by_gate)
    assert past() == began, f"{past() - began} packets went past the exit node"
    alice.succeed("lacis set --exit-node-allow-lan-access=false")
    wait_for(lambda: not reaches(alice, address(printer)), "the printer is out of reach again")

with subtest("alice's daemon restarts: the choice stays, and nothing goes past"):
    restart(alice)
    began = past()
    wait_for(lambda: reaches(alice, webs[0], limit=3), "alice reaches web", timeout=30)
    leaves_by(alice, by_gate)
    assert past() == began, f"{past() - began} packets went past the exit node"

def swept(sweeps):
    """Sweeps away what there is, one after the other, while alice sends; nothing of that may leave beside the exit node."""
    for what, sweep in sweeps.items():
        before, began = home_of(alice), past()
        alice.succeed(sweep)
        # It is a guard that lets nothing out meanwhile, not the speed of the repair.
        began_at = time.monotonic()
        while home_of(alice) != before:
            assert time.monotonic() - began_at < SOON, f"{what}: not back after {SOON} s"
        log.info(f"      {what}: back after less than {time.monotonic() - began_at:.2f} s")
        assert past() == began, f"{what}: {past() - began} packets went past the exit node"
        wait_for(lambda: reaches(alice, webs[0], limit=3), "alice reaches web", timeout=20)


def home_of(machine):
    """What lacisd has set on a host."""
    look = "ip -$f rule; ip -$f route show table 52; ip -$f route show table 5252"
    look = f"{BOTH.format(look)}; nft list ruleset; ip -br address show dev lacis0 scope global"
    return sorted(line.strip() for line in machine.succeed(look).splitlines())


with subtest("swept away, nothing leaves beside it"):
    put(alice, "/tmp/flood.py", FLOOD)
    alice.succeed(f"python3 /tmp/flood.py {' '.join(webs)} > /tmp/flood.log 2>&1 & echo $! > /tmp/flood.pid")
    alice.wait_until_succeeds("grep ready /tmp/flood.log", timeout=10)
    swept(SWEEPS)

with subtest("nor where lacisd leaves the firewall alone"):
    alice.succeed("lacis set --netfilter-mode=off")
    wait_for(lambda: "lacis" not in alice.succeed("nft list ruleset"), "the firewall is left alone")
    swept({what: sweep for what, sweep in SWEEPS.items() if what != "the rules"})
    alice.succeed("lacis set --netfilter-mode=on")
    wait_for(lambda: "guard" in alice.succeed("nft list ruleset"), "the firewall is set up again")

with subtest("nor for programs that choose the device"):
    began = past()
    for host in webs:
        alice.fail(f"ping -I eth0 -c 2 -i 0.2 -W 1 {host}")
    assert past() == began, f"{past() - began} packets went past the exit node"

with subtest("killed, or without its device, alice's daemon leaves the guard behind"):
    kill = lambda: alice.systemctl("kill --signal=SIGKILL lacisd.service")
    ends = {"killed": kill, "without its device": lambda: alice.succeed("ip link del lacis0")}
    for end, act in ends.items():
        began = past()
        act()
        alice.wait_until_fails("ip link show lacis0", timeout=5)
        for host in webs:
            assert not reaches(alice, host, limit=0.3)
        wait_for(lambda: "default" in routes(alice), f"{end}, alice has its routes again", timeout=20)
        wait_for(lambda: reaches(alice, webs[0], limit=3), f"{end}, alice reaches web", timeout=20)
        assert past() == began, f"{end}: {past() - began} packets went past the exit node"
    alice.succeed("kill $(cat /tmp/flood.pid)")
    leaves_by(alice, by_gate)

with subtest("killed, and not started again: nothing leaves until --cleanup has put everything back"):
    began = past()
    kill()
    alice.systemctl("stop lacisd.service")
    # Unless it was started once more before it was stopped.
    if alice.execute("ip rule | grep -q 5270")[0] == 0:
        is_cut_off(alice)
        assert past() == began, f"{past() - began} packets went past the exit node"
    alice.succeed("lacisd --cleanup")
    # Without the device, too.
    assert host_routes(alice) == [line for line in without if "lacis0" not in line]
    assert alice.succeed(valid_mark) == mark_without
    assert "lacis" not in alice.succeed("nft list ruleset; cat /etc/resolv.conf")
    leaves_by(alice, by_itself)
    alice.systemctl("start lacisd.service")
    wait_for(lambda: reaches(alice, webs[0], limit=3), "alice reaches web", timeout=30)
    leaves_by(alice, by_gate)

with subtest("the exit node dies: nothing leaves"):
    began, heard = past(), web.succeed("wc -l < /tmp/mirror.log")
    gate.crash()
    is_cut_off(alice)
    wait_for(lambda: not peers(alice)["gate"]["Online"], "alice knows that gate is away", timeout=40)
    is_cut_off(alice)
    assert web.succeed("wc -l < /tmp/mirror.log") == heard, "web has heard something"
    assert past() == began, f"{past() - began} packets went past the exit node"

with subtest("it comes back, and all goes on"):
    gate.start()
    forwarding(gate, 1)
    gate.wait_for_unit("lacisd.service", timeout=30)
    wait_for(lambda: reaches(alice, webs[0], limit=3), "alice reaches web", timeout=40)
    leaves_by(alice, by_gate)
    assert past() == began, f"{past() - began} packets went past the exit node"

with subtest("its approval is withdrawn: nothing leaves either"):
    withdraw = lambda: admin("nodes approve-routes gate --routes ''")
    within(SOON + 1, withdraw, lambda: not reaches(alice, webs[0], limit=0.5), "alice is cut off")
    is_cut_off(alice)
    assert past() == began, f"{past() - began} packets went past the exit node"

with subtest("a policy approves it by itself"):
    policy = {
        "grants": [
            {"src": ["autogroup:member"], "dst": ["autogroup:member"], "ip": ["*"]},
            {"src": ["autogroup:member"], "dst": ["autogroup:internet"], "ip": ["*"]},
        ],
        "autoApprovers": {"exitNode": ["autogroup:member"]},
    }
    within(SOON + 1, lambda: set_policy(hub, policy), lambda: reaches(alice, webs[0], limit=1), "alice reaches web")
    leaves_by(alice, by_gate)

with subtest("without the internet in the policy nothing leaves"):
    inside = {**policy, "grants": policy["grants"][:1]}
    closed = lambda: not reaches(alice, webs[0], limit=0.5)
    within(SOON + 1, lambda: set_policy(hub, inside), closed, "alice is cut off")
    is_cut_off(alice)
    assert past() == began, f"{past() - began} packets went past the exit node"
    within(SOON + 1, lambda: set_policy(hub, policy), lambda: reaches(alice, webs[0], limit=1), "alice reaches web again")

with subtest("strict filters of return paths hurt nothing, or the remedy is told"):
    conf = "/proc/sys/net/ipv4/conf"
    switches = [f"{conf}/all/rp_filter", f"{conf}/eth0/rp_filter"]
    found = [alice.succeed(f"cat {path}").strip() for path in switches]
    alice.succeed(*(f"echo 1 > {path}" for path in switches))
    counts = lambda: alice.succeed(f"cat {conf}/all/src_valid_mark").strip() == "1"
    told = lambda: "src_valid_mark" in alice.succeed("lacis status 2>&1")
    wait_for(lambda: counts() or told(), "marks count, or it is said that they should")
    if not counts():
        switches.append(f"{conf}/all/src_valid_mark")
        found.append("0")
        alice.succeed(f"echo 1 > {switches[-1]}")
    restart(alice)
    began = past()
    wait_for(lambda: reaches(alice, webs[0], limit=3), "alice reaches web", timeout=30)
    leaves_by(alice, by_gate)
    alice.succeed("lacis ping gate", timeout=30)
    alice.succeed(*(f"echo {value} > {path}" for path, value in zip(switches, found)))
    assert past() == began, f"{past() - began} packets went past the exit node"

with subtest("the end of it: everything is as before"):
    within(SOON, use(alice, ""), lambda: host_routes(alice) == before, "alice's routes are as before")
    leaves_by(alice, by_itself)
    assert resolve(alice) == {by_itself[0]}
    assert reaches(alice, address(printer))
    assert past() > began

if present("dora"):
    with subtest("tailscaled uses our exit node"):
        enter(hub, URL, dora, "tailscale")
        wait_for(lambda: peers(dora, "tailscale")["gate"]["ExitNodeOption"], "dora may use gate")
        use(dora, "gate", "tailscale")()
        for host in webs:
            wait_for(lambda: reaches(dora, host, limit=3), f"dora reaches {host}", timeout=20)
        began = past()
        leaves_by(dora, by_gate)
        assert resolve(dora) == {by_gate[0]}
        assert past() == began, f"{past() - began} packets went past the exit node"
        use(dora, "", "tailscale")()

if present("emil"):
    with subtest("tailscaled is an exit node of ours"):
        forwarding(emil, 1)
        enter(hub, URL, emil, "tailscale")
        emil.succeed("tailscale set --advertise-exit-node")
        wait_for(lambda: "emil" in peers(alice) and peers(alice)["emil"]["ExitNodeOption"], "alice may use emil")
        before = host_routes(alice)
        use(alice, "emil")()
        for host in webs:
            wait_for(lambda: reaches(alice, host, limit=3), f"alice reaches {host}", timeout=20)
        began = past()
        by_emil = [address(attic, "wan"), address(emil, family=6)]
        leaves_by(alice, by_emil)
        assert resolve(alice) == {by_emil[0]}
        assert past() == began, f"{past() - began} packets went past the exit node"
        emil.crash()
        is_cut_off(alice)
        assert past() == began, f"{past() - began} packets went past the exit node"
        within(SOON, use(alice, ""), lambda: host_routes(alice) == before, "alice's routes are as before")

with subtest("without the mesh all is as it was without it"):
    use(alice, "gate")()
    wait_for(lambda: "default" in routes(alice), "alice uses gate")
    alice.succeed("lacis down")
    wait_for(lambda: host_routes(alice) == without, "alice's routes are as without the mesh")
    wait_for(lambda: alice.succeed(valid_mark) == mark_without, "marks count as much as without it")
    leaves_by(alice, by_itself)
