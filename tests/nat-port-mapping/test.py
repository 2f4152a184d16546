"""A node asks its router (a real miniupnpd) for a port, tells everybody, and is reached there."""

import json
import re

URL = "https://mesh.example.org"


def mapped():
    """Ports that the router hands on to the node."""
    rules = home.succeed("nft list ruleset")
    return set(re.findall(rf"dport (\d+) dnat ip to {re.escape(address(served))}:", rules))


start_all()

with subtest("both join"):
    join(hub, URL, served, away)

with subtest("netcheck says what the router can do"):
    found = json.loads(served.succeed("lacis netcheck --json", timeout=20))
    assert found["UPnP"] and found["PMP"] and found["PCP"], found
    found = json.loads(away.succeed("lacis netcheck --json", timeout=20))
    assert not found["UPnP"] and not found["PMP"] and not found["PCP"], found

with subtest("the router has opened a port, and the node says so"):
    wait_for(mapped, "a port is mapped")
    outside = address(home, "wan")
    wanted = {f"{outside}:{port}" for port in mapped()}
    wait_for(lambda: wanted & set(status(served)["Self"]["Addrs"] or []), f"{wanted} is among its endpoints")

with subtest("a node behind a symmetric NAT goes direct to it"):
    away.succeed("lacis ping served", timeout=30)
    path = peers(away)["served"]["CurAddr"]
    assert path in wanted, f"{path}, not {wanted}"
    copy(away, served, "served")
