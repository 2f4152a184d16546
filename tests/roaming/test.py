"""Alice's way to the internet changes again and again while a TCP connection between her and bob is open."""

import time
from itertools import count, pairwise

URL = "https://mesh.example.org"
# Seconds: between two bytes that are sent, and what a change may cost.
STEP = 0.05
GAP, DIRECT, CONTROL = 2, 5, 5
# How long a change is watched after all is well again, and how long there is no network.
SETTLED, ASLEEP = 3, 8

# Both ends of one TCP connection: a byte each STEP until the file /tmp/enough is there, and a line "when total" for what
# comes; in the end how many went and came.
COUNTER = f"""
import os, select, socket, sys, time
if len(sys.argv) > 1:
    connection = socket.create_connection((sys.argv[1], 7000), 10)
else:
    server = socket.create_server(("", 7000))
    print("listening", flush=True)
    connection = server.accept()[0]
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
sent = came = 0
due, open_here, open_there = time.monotonic(), True, True
while open_here or open_there:
    if open_here and time.monotonic() >= due:
        due += {STEP}
        connection.sendall(b".")
        sent += 1
        if os.path.exists("/tmp/enough"):
            connection.shutdown(socket.SHUT_WR)
            open_here = False
    if select.select([connection] if open_there else [], [], [], max(due - time.monotonic(), 0))[0]:
        data = connection.recv(65536)
        came += len(data)
        open_there = bool(data)
        print(time.time(), came, flush=True)
print("sent", sent, "came", came, flush=True)
"""


def arrivals(machine):
    """When bytes came."""
    lines = machine.succeed("sed -n '/^[0-9]/p' /tmp/counter.log").splitlines()
    return [float(line.split()[0]) for line in lines]


def longest_gap(since):
    """The longest time without a byte on either side, since a moment when they flowed or should have."""
    sides = [[since, *(when for when in arrivals(machine) if when > since)] for machine in (alice, bob)]
    return max(after - before for side in sides for before, after in pairwise(side))


def flow(seconds):
    """Waits until bytes have come on both sides for some time from now on."""
    began = clock(alice)
    lately = lambda machine: len([when for when in arrivals(machine) if when > began])
    wait_for(lambda: min(map(lately, (alice, bob))) >= seconds / STEP, "bytes flow both ways", timeout=30)


def way_to_bob():
    """Whatever he is called at the moment."""
    return next(iter(peers(alice).values()))["CurAddr"]


names = (f"bob{number}" for number in count(1))


def change(what, command, seen_at, no_longer="", gap=GAP):
    """Changes alice's network by a command; says what that costs and fails if it is too much.

    Afterwards bob sees her at the address `seen_at`, at another port than `no_longer`. Her control session is back when
    she hears of a change of a name.
    """
    began, name = clock(alice), next(names)
    alice.succeed(command)
    start = time.monotonic()
    hub.succeed(f"lacis admin nodes rename {bob_address} {name}")
    direct = control = None
    while (direct is None or control is None) and time.monotonic() < start + 30:
        if control is None and name in peers(alice):
            control = time.monotonic() - start
        seen = way(bob, "alice")
        if direct is None and seen.startswith(f"{seen_at}:") and seen != no_longer and way_to_bob():
            direct = time.monotonic() - start
    flow(SETTLED)
    worst = longest_gap(began)
    say = lambda seconds: "never" if seconds is None else f"{seconds:.1f} s"
    log.info(f"      {what}: no bytes for {worst:.2f} s, direct after {say(direct)}, control after {say(control)}")
    assert gap is None or worst <= gap, f"no bytes for {worst:.2f} s"
    assert direct is not None and direct <= DIRECT, f"direct after {say(direct)}: {way(bob, 'alice')!r} of {seen_at}"
    assert control is not None and control <= CONTROL, f"control after {say(control)}"


start_all()

with subtest("alice and bob join, and are direct"):
    join(hub, URL, alice, bob)
    bob_address = bob.succeed("lacis ip -4").strip()
    alice.succeed("lacis ping bob", timeout=30)
    wait_for(lambda: way(bob, "alice"), "bob is direct too")

with subtest("a TCP connection is open"):
    for machine in (alice, bob):
        machine.succeed(f"cat > /tmp/counter.py <<'END'\n{COUNTER}\nEND")
    bob.succeed("python3 /tmp/counter.py > /tmp/counter.log 2>&1 &")
    bob.wait_until_succeeds("grep listening /tmp/counter.log", timeout=10)
    alice.succeed(f"python3 /tmp/counter.py {bob_address} > /tmp/counter.log 2>&1 &")
    flow(1)

at_home, at_cafe = address(home, "wan"), address(cafe, "wan")
own = {device: address(alice, device) for device in ("eth0", "eth1")}
routers = {"eth0": address(home, "lan"), "eth1": address(cafe, "lan")}


def connect(device, metric=0):
    """The command that plugs a cable in."""
    return (
        f"ip link set {device} up; ip addr replace {own[device]}/24 dev {device}; "
        f"ip route replace default via {routers[device]} dev {device} metric {metric}"
    )


def disconnect(device):
    """And out."""
    return f"ip addr flush dev {device}; ip link set {device} down"


with subtest("she goes to the café"):
    leave = f"ip route del default dev eth0; {disconnect('eth0')}"
    change("to another network", leave, at_cafe)

with subtest("she comes home"):
    change("and back", f"{connect('eth0')}; {disconnect('eth1')}", at_home)

with subtest("she gets another address at home"):
    another = f"{own['eth0'].rsplit('.', 1)[0]}.77"
    readdress = f"ip addr del {own['eth0']}/24 dev eth0; ip addr add {another}/24 dev eth0"
    own["eth0"] = another
    readdress += f"; ip route replace default via {routers['eth0']} dev eth0"
    change("another address", readdress, at_home, no_longer=way(bob, "alice"))

with subtest(f"she has no network for {ASLEEP} s"):
    alice.succeed("ip link set eth0 down")
    alice.succeed(f"sleep {ASLEEP}", timeout=30)
    assert not way_to_bob(), "alice believes that she is connected"
    wait_for(lambda: not way(bob, "alice"), "bob has given her up", timeout=1)
    change(f"asleep for {ASLEEP} s", connect("eth0"), at_home, gap=None)

with subtest("a second network beside the first disturbs nothing"):
    began = clock(alice)
    alice.succeed(connect("eth1", metric=2048))
    flow(SETTLED)
    assert longest_gap(began) < 0.5, f"no bytes for {longest_gap(began):.2f} s"
    # Whichever of the two he uses: what he sends to the other arrives as well.
    assert way(bob, "alice") and way_to_bob(), "they are not direct any more"

with subtest("the first is gone without a word"):
    # A virtual machine's cannot be deleted.
    change("device deleted", "ip link delete eth0 || ip link set eth0 down", at_cafe)

with subtest("the TCP connection lived through all that, and lost nothing"):
    for machine in (alice, bob):
        machine.succeed("touch /tmp/enough")
    ends = [machine.wait_until_succeeds("grep sent /tmp/counter.log", timeout=30).split() for machine in (alice, bob)]
    (_, sent, _, came), (_, sent_back, _, came_back) = ends
    assert (sent, came) == (came_back, sent_back), ends
    log.info(f"      {sent} bytes there, {sent_back} back")
