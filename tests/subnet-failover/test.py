"""Routers of one network die in every way; alice goes on asking the printer there, which says by whom she comes."""

import json

URL = "https://mesh.example.org"
# Seconds: what a dead router may cost, and a change of the policy.
FAILOVER, SOON = 5, 2

# Asks a mirror by UDP twenty times a second, from one socket; prints when an answer came and what it said.
PROBE = """
import select, socket, sys, time
asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
asking.connect((sys.argv[1], 8000))
due = time.monotonic()
while True:
    try:
        if time.monotonic() >= due:
            due += 0.05
            asking.send(b"?")
        if select.select([asking], [], [], max(due - time.monotonic(), 0))[0]:
            print(time.time(), asking.recv(100).decode(), flush=True)
    except OSError:
        # Somebody said that it cannot be reached.
        pass
"""


def admin(command):
    return hub.succeed(f"lacis admin {command}", timeout=20)


def answers():
    """When answers came to alice, and by which router she was seen there."""
    lines = alice.succeed("tail -n 400 /tmp/probe.log").splitlines()
    return [(float(when), by_address.get(shown, shown)) for when, shown in map(str.split, lines)]


def router_in_use():
    """By whom alice's questions go at this moment; nobody if no answer came lately."""
    now = clock(alice)
    return next((name for when, name in reversed(answers()) if when > now - 0.5), None)


def online(name):
    nodes = json.loads(admin("nodes list --json"))
    return any(node["name"] == name and node["online"] for node in nodes)


def die(machine):
    """Its daemon is killed, and before it can be started again the power goes: the session ends at once."""
    machine.systemctl(f"kill --signal=SIGKILL {daemon[machine.name]}.service")
    machine.crash()


def stop(machine):
    machine.systemctl(f"stop {daemon[machine.name]}.service")


def live(machine):
    """It is switched on, or its daemon started, and is connected."""
    machine.start()
    machine.succeed("echo 1 > /proc/sys/net/ipv4/ip_forward")
    machine.systemctl(f"start {daemon[machine.name]}.service")
    machine.wait_for_unit(f"{daemon[machine.name]}.service", timeout=30)
    wait_for(lambda: online(machine.name), f"{machine.name} is online", timeout=30)


def failover(what, act, old, new):
    """Does something to the router in use; the answers go on by the next. Says how long there were none."""
    assert router_in_use() == old.name, f"{router_in_use()} is in use, not {old.name}"
    began = clock(alice)
    act(old)
    wait_for(lambda: router_in_use() == new.name, f"{new.name} takes over from {old.name}", timeout=30)
    first = min(when for when, name in answers() if name == new.name and when > began)
    last = max([when for when, name in answers() if name == old.name and when < first], default=began)
    log.info(f"      {what}: {new.name} answers {first - began:.2f} s later, no answers for {first - last:.2f} s")
    assert first - began <= FAILOVER, f"{first - began:.2f} s"
    # New connections too.
    assert seen_by(address(printer), alice) == address(new)


start_all()

with subtest("all join; the routers one after the other"):
    order = [ada, *([dora] if present("dora") else []), bea, cleo]
    daemon = {machine.name: "tailscaled" if machine.name == "dora" else "lacisd" for machine in order}
    by_address = {address(machine): machine.name for machine in order}
    lan = f"{address(office, 'lan').rsplit('.', 1)[0]}.0/24"
    join(hub, URL, alice, bob)
    for machine in order:
        machine.succeed("echo 1 > /proc/sys/net/ipv4/ip_forward")
        command = daemon[machine.name].removesuffix("d")
        enter(hub, URL, machine, command, f"--tags tag:{machine.name}")
        machine.succeed(f"{command} set --advertise-routes={lan}")
    mirror(printer)
    for machine in (alice, bob):
        machine.succeed("lacis set --accept-routes")

with subtest("approved from the last to the first, the first to join is the one"):
    for machine in reversed(order):
        hub.wait_until_succeeds(f"lacis admin nodes show {machine.name} --json | grep {lan}", timeout=10)
        admin(f"nodes approve-routes {machine.name} --routes {lan}")
    for machine in (alice, bob):
        wait_for(lambda: lan in routes(machine), f"{machine.name} has the route")
    alice.wait_until_succeeds(f"ping -c 1 -W 1 {address(printer)}", timeout=15)
    put(alice, "/tmp/probe.py", PROBE)
    alice.succeed(f"python3 /tmp/probe.py {address(printer)} > /tmp/probe.log 2>&1 &")
    wait_for(lambda: router_in_use() == "ada", "ada is in use")
    assert seen_by(address(printer), bob) == address(ada)

with subtest("the one in use dies: the next takes over"):
    for old, new in zip(order, order[1:]):
        failover(f"{old.name} is killed", die, old, new)

with subtest("the last dies: nobody; any that comes back recovers"):
    die(order[-1])
    wait_for(lambda: router_in_use() is None, "nobody is in use")
    for machine in (order[1], order[-1], order[0]):
        live(machine)
        wait_for(lambda: router_in_use() == machine.name, f"{machine.name} is in use", timeout=15)
        # It dies with its network dark, so that the next is again the only one.
        die(machine)
        wait_for(lambda: router_in_use() is None, "nobody is in use again")
        wait_for(lambda: not online(machine.name), f"{machine.name} is offline", timeout=30)

with subtest("one that stops in order hands over"):
    for machine in order[1::-1]:
        live(machine)
    wait_for(lambda: router_in_use() == "ada", "ada is in use", timeout=15)
    failover("ada stops", stop, ada, order[1])

with subtest("those that come back disturb nobody"):
    began = clock(alice)
    for machine in order:
        live(machine)
    alice.succeed("sleep 3")
    times = [when for when, _ in answers() if when > began]
    longest = max(after - before for before, after in zip(times, times[1:]))
    log.info(f"      no answers for {longest:.2f} s at most")
    assert longest <= FAILOVER, f"{longest:.2f} s"
    wait_for(lambda: router_in_use() == "ada", "ada, the first, is in use again")

with subtest("the approval of the one in use is withdrawn: the next takes over"):
    withdraw = lambda: admin("nodes approve-routes ada --routes ''")
    within(SOON, withdraw, lambda: router_in_use() == order[1].name, f"{order[1].name} is in use")
    allow = lambda: admin(f"nodes approve-routes ada --routes {lan}")
    within(SOON, allow, lambda: router_in_use() == "ada", "ada is in use again")

with subtest("the cable of the one in use is cut"):
    failover("ada is cut off", lambda machine: machine.block(), ada, order[1])
    ada.unblock()
    wait_for(lambda: router_in_use() == "ada", "ada is in use again", timeout=60)

with subtest("a policy chooses the router for whom it says"):
    special = order[-1]
    alice4, bob4 = (machine.succeed("lacis ip -4").strip() for machine in (alice, bob))
    policy = {
        "tagOwners": {f"tag:{machine.name}": [] for machine in order},
        "grants": [
            {"src": [bob4], "dst": [lan], "ip": ["*"]},
            {"src": [alice4], "dst": [lan], "ip": ["*"], "via": [f"tag:{special.name}"]},
        ],
    }
    within(SOON, lambda: set_policy(hub, policy), lambda: router_in_use() == special.name, f"{special.name} is alice's")
    assert seen_by(address(printer), bob) == address(ada)
    policy["grants"][1]["via"] = [f"tag:{order[1].name}"]
    within(SOON, lambda: set_policy(hub, policy), lambda: router_in_use() == order[1].name, f"{order[1].name} is alice's")
