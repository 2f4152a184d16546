"""Our client in a Headscale network, with one of Tailscale's."""

import json
import re

URL = "https://mesh.example.org"
DOMAIN = "net.example.org"
COMMANDS = {"lena": "lacis", "dora": "tailscale"}
CLIENTS = {"lena": lena, "dora": dora}


def headscale(command):
    return json.loads(hub.succeed(f"headscale {command} -o json", timeout=20))


def node_id(name):
    """Headscale 0.29 and older say `given_name`."""
    for node in headscale("nodes list"):
        if name == node.get("givenName", node.get("given_name")):
            return node["id"]
    raise AssertionError(f"Headscale knows no {name}")


def join(name, flags=""):
    machine = CLIENTS[name]
    key = headscale(f"preauthkeys create --user {user} --expiration 1h")["key"]
    machine.succeed(f"umask 077; printf %s {key} > /tmp/auth-key")
    command = f"{COMMANDS[name]} up --login-server={URL} --auth-key=file:/tmp/auth-key --timeout=30s {flags}"
    machine.succeed(command, timeout=40)


start_all()

with subtest("Headscale and derper are up"):
    hub.wait_for_unit("headscale.service", timeout=30)
    hub.wait_for_open_port(443, timeout=30)
    derp.wait_for_open_port(443, timeout=30)
    hub.wait_for_open_unix_socket("/run/headscale/headscale.sock", timeout=30)
    user = headscale("users create family")["id"]

with subtest("both join"):
    addresses = {}
    for name, machine in CLIENTS.items():
        machine.wait_for_unit(f"{COMMANDS[name]}d.service", timeout=30)
        join(name)
        addresses[name] = machine.succeed(f"{COMMANDS[name]} ip -4").strip()
    # The server tells changes in batches.
    wait_for(lambda: "dora" in peers(lena), "lena sees dora")
    wait_for(lambda: "lena" in peers(dora, "tailscale"), "dora sees lena")

with subtest("they ping each other, by disco and by ICMP"):
    lena.wait_until_succeeds("lacis ping -c 1 --timeout=2s --until-direct=false dora", timeout=30)
    for here, there in (("lena", "dora"), ("dora", "lena")):
        said = CLIENTS[here].succeed(f"{COMMANDS[here]} ping -c 2 --until-direct=false {there}", timeout=30)
        assert re.search(rf"pong from {there} \({addresses[there]}\) via DERP\(drp\) in \d+ ?ms", said), said
        CLIENTS[here].succeed(f"ping -c 2 -i 0.2 -W 5 {there}", timeout=20)

with subtest("they copy data both ways"):
    copy(lena, dora, "dora", 7001)
    copy(dora, lena, "lena", 7002)

with subtest("names resolve on both"):
    for machine in CLIENTS.values():
        for name, address in addresses.items():
            assert machine.succeed(f"dig +short @100.100.100.100 {name}.{DOMAIN}").split() == [address]

with subtest("whois knows the other"):
    said = json.loads(lena.succeed(f"lacis whois --json {addresses['dora']}"))
    assert said["Node"]["Name"] == f"dora.{DOMAIN}.", said

with subtest("a rename reaches both"):
    number = node_id("dora")
    headscale(f"nodes rename --identifier {number} dorothy")
    wait_for(lambda: "dorothy" in peers(lena), "lena sees the new name")
    lena.wait_until_succeeds(f"dig +short @100.100.100.100 dorothy.{DOMAIN} | grep {addresses['dora']}", timeout=20)

with subtest("a restart of Headscale does not disturb what flows"):
    hub.systemctl("restart headscale.service")
    lena.succeed(f"ping -c 3 -i 0.2 -W 5 {addresses['dora']}", timeout=20)
    hub.wait_for_open_unix_socket("/run/headscale/headscale.sock", timeout=30)
    headscale(f"nodes rename --identifier {number} dora")
    wait_for(lambda: "dora" in peers(lena), "lena hears of changes again", timeout=90)

with subtest("an expired key is told, and a new login heals it"):
    headscale(f"nodes expire --identifier {node_id('lena')}")
    wait_for(
        lambda: status(lena)["BackendState"] == "NeedsLogin",
        "lena knows that she has to log in",
        timeout=60,
    )
    join("lena", "--force-reauth")
    assert lena.succeed("lacis ip -4").strip() == addresses["lena"], "lena keeps her address"
    lena.wait_until_succeeds("ping -c 1 -W 2 dora", timeout=30)
