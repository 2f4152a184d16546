"""The coordinator stops: traffic, names and even a restarted client live on what it has told before."""

import time

URL = "https://mesh.example.org"
DOMAIN = "lab.example.org"
# Alice and bob are connected by the relay, carol and dave directly.
CLIENTS = {"alice": alice, "bob": bob, "carol": carol, "dave": dave}


def talk():
    """Both ways, by name; the answer to a name is what it was."""
    alice.succeed("ping -c 2 -i 0.2 -W 5 bob", timeout=20)
    bob.succeed("ping -c 2 -i 0.2 -W 5 alice", timeout=20)
    assert alice.succeed(f"dig +short @100.100.100.100 bob.{DOMAIN}").split() == [addresses["bob"]]


def talk_directly():
    """The same for those who need no relay: nothing is lost."""
    for here, there in (("carol", "dave"), ("dave", "carol")):
        CLIENTS[here].succeed(f"ping -c 10 -i 0.1 -W 2 {there} | grep ' 0% packet loss'", timeout=20)
        assert way(CLIENTS[here], there), f"{there} is not reached directly by {here}"
        said = CLIENTS[here].succeed(f"dig +short @100.100.100.100 {there}.{DOMAIN}")
        assert said.split() == [addresses[there]], said


start_all()

with subtest("coordinator and relay are up, all clients join"):
    relay.wait_for_unit("lacis-relay.service", timeout=30)
    join(hub, URL, *CLIENTS.values())
    addresses = {name: machine.succeed("lacis ip -4").strip() for name, machine in CLIENTS.items()}
    alice.wait_until_succeeds("ping -c 1 -W 1 bob", timeout=15)
    talk()

with subtest("the coordinator stops: peers go on talking"):
    hub.systemctl("stop lacis-coordinator.service")
    talk()

with subtest("a client that goes down and up comes up from what it knows"):
    alice.succeed("lacis down")
    alice.succeed("lacis up --timeout=20s", timeout=30)
    alice.wait_until_succeeds("ping -c 1 -W 1 bob", timeout=15)
    talk()

with subtest("a client that restarts now comes up from its cache"):
    alice.systemctl("restart lacisd.service")
    alice.wait_for_unit("lacisd.service", timeout=30)
    alice.wait_until_succeeds("ping -c 1 -W 1 bob", timeout=30)
    assert alice.succeed("lacis ip -4").strip() == addresses["alice"]
    talk()

with subtest("so does a machine that reboots"):
    reboot(bob)
    bob.wait_for_unit("lacisd.service", timeout=30)
    bob.wait_until_succeeds("ping -c 1 -W 1 alice", timeout=30)
    talk()

with subtest("the relay stops too: direct peers go on talking"):
    for here, there in (("carol", "dave"), ("dave", "carol")):
        CLIENTS[here].succeed(f"lacis ping {there}", timeout=30)
    relay.systemctl("stop lacis-relay.service")
    for _ in range(2):
        talk_directly()
        carol.succeed("sleep 2")

for first, name in ((carol, "dave"), (dave, "carol")):
    with subtest(f"carol restarts now, {first.name} talks first: direct from what they know"):
        known = way(dave, "carol")
        carol.systemctl("restart lacisd.service")
        carol.wait_for_unit("lacisd.service", timeout=30)
        began = time.monotonic()
        first.wait_until_succeeds(f"ping -c 1 -W 1 {addresses[name]}", timeout=5)
        log.info(f"      {name} answers {time.monotonic() - began:.1f} s after carol's restart")
        assert carol.succeed("lacis ip -4").strip() == addresses["carol"]
        talk_directly()
        assert (now := way(dave, "carol")) == known, f"carol is at {now!r}, no longer at {known}"

with subtest("both are back: all hear of changes"):
    relay.systemctl("start lacis-relay.service")
    hub.systemctl("start lacis-coordinator.service")
    hub.wait_for_unit("lacis-coordinator.service", timeout=30)
    hub.succeed("lacis admin nodes rename bob robert")
    alice.wait_until_succeeds("lacis status | grep -w robert", timeout=60)
    hub.succeed("lacis admin nodes rename alice alicia")
    bob.wait_until_succeeds("lacis status | grep -w alicia", timeout=60)
    hub.wait_until_succeeds("test $(lacis admin nodes list --json | grep -c '\"online\": *true') = 4", timeout=60)
