"""The coordinator stops: traffic, names and even a restarted client live on what it has told before."""

import json

URL = "https://mesh.example.org"
DOMAIN = "lab.example.org"
CLIENTS = {"alice": alice, "bob": bob}


def talk():
    """Both ways, by name; the answer to a name is what it was."""
    alice.succeed("ping -c 2 -i 0.2 -W 5 bob", timeout=20)
    bob.succeed("ping -c 2 -i 0.2 -W 5 alice", timeout=20)
    assert alice.succeed(f"dig +short @100.100.100.100 bob.{DOMAIN}").split() == [addresses["bob"]]


start_all()

with subtest("coordinator and relay are up, both clients join"):
    hub.wait_for_unit("lacis-coordinator.service", timeout=30)
    relay.wait_for_unit("lacis-relay.service", timeout=30)
    hub.succeed("lacis admin users create family")
    addresses = {}
    for name, machine in CLIENTS.items():
        key = json.loads(hub.succeed("lacis admin keys create --user family --json"))["key"]
        machine.succeed(f"umask 077; printf %s {key} > /tmp/auth-key")
        machine.wait_for_unit("lacisd.service", timeout=30)
        machine.succeed(f"lacis up --login-server={URL} --auth-key=file:/tmp/auth-key --timeout=20s", timeout=30)
        addresses[name] = machine.succeed("lacis ip -4").strip()
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
    bob.reboot()
    bob.wait_for_unit("lacisd.service", timeout=30)
    bob.wait_until_succeeds("ping -c 1 -W 1 alice", timeout=30)
    talk()

with subtest("the coordinator is back: both hear of changes"):
    hub.systemctl("start lacis-coordinator.service")
    hub.wait_for_unit("lacis-coordinator.service", timeout=30)
    hub.succeed("lacis admin nodes rename bob robert")
    alice.wait_until_succeeds("lacis status | grep -w robert", timeout=60)
    hub.succeed("lacis admin nodes rename alice alicia")
    bob.wait_until_succeeds("lacis status | grep -w alicia", timeout=60)
    hub.wait_until_succeeds("test $(lacis admin nodes list --json | grep -c '\"online\": *true') = 2", timeout=60)
