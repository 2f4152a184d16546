"""Tailscale's own client in our network: first among its like, then with lacisd."""

import json
import re

URL = "https://mesh.example.org"
DOMAIN = "lab.example.org"
LACISD = "tailscale --socket=/run/lacis/lacisd.sock"
STOCK = {"dora": dora, "emil": emil}


def admin(command):
    return hub.succeed(f"lacis admin {command}", timeout=20)


def new_key(flags=""):
    return json.loads(admin(f"keys create --user family {flags} --json"))["key"]


def join(machine, command, flags=""):
    machine.succeed(f"umask 077; printf %s {new_key(flags)} > /tmp/auth-key")
    machine.succeed(f"{command} --login-server={URL} --auth-key=file:/tmp/auth-key --timeout=30s", timeout=40)


start_all()

with subtest("coordinator and relay are up"):
    hub.wait_for_unit("lacis-coordinator.service", timeout=30)
    relay.wait_for_unit("lacis-relay.service", timeout=30)
    admin("users create family")

with subtest("stock clients join"):
    for machine in STOCK.values():
        machine.wait_for_unit("tailscaled.service", timeout=30)
        join(machine, "tailscale up")
    addresses = {name: machine.succeed("tailscale ip -4").strip() for name, machine in STOCK.items()}

with subtest("stock: ping by disco, ICMP by name, TCP"):
    dora.succeed("tailscale ping -c 1 --until-direct=false emil", timeout=20)
    dora.succeed("ping -c 2 -i 0.2 -W 5 emil", timeout=20)
    emil.succeed(f"ping -c 2 -i 0.2 -W 5 dora.{DOMAIN}", timeout=20)
    copy(dora, emil, "emil")

with subtest("stock: names, addresses and names of addresses"):
    for name in ("emil", "dora"):
        assert dora.succeed(f"dig +short @100.100.100.100 {name}.{DOMAIN}").split() == [addresses[name]]
    assert dora.succeed(f"dig +short @100.100.100.100 -x {addresses['emil']}").strip() == f"emil.{DOMAIN}."
    assert "NXDOMAIN" in dora.succeed(f"dig @100.100.100.100 nobody.{DOMAIN}")

with subtest("stock: whois"):
    said = json.loads(dora.succeed(f"tailscale whois --json {addresses['emil']}"))
    assert said["Node"]["Name"] == f"emil.{DOMAIN}.", said
    assert said["UserProfile"]["LoginName"], said

with subtest("stock: Taildrop"):
    dora.succeed("echo a letter > /tmp/letter.txt")
    dora.succeed("tailscale file cp /tmp/letter.txt emil:", timeout=30)
    emil.succeed("mkdir -p /tmp/inbox && tailscale file get --wait /tmp/inbox", timeout=30)
    assert emil.succeed("cat /tmp/inbox/letter.txt") == "a letter\n"

with subtest("stock: an ephemeral node goes when it is gone"):
    fred.wait_for_unit("tailscaled.service", timeout=30)
    join(fred, "tailscale up", "--ephemeral")
    wait_for(lambda: "fred" in peers(dora, "tailscale"), "dora sees fred")
    fred.crash()
    wait_for(lambda: "fred" not in peers(dora, "tailscale"), "fred is deleted", timeout=40)

with subtest("stock: a rename reaches everybody"):
    admin("nodes rename emil emily")
    wait_for(lambda: "emily" in peers(dora, "tailscale"), "dora sees the new name")
    dora.wait_until_succeeds(f"dig +short @100.100.100.100 emily.{DOMAIN} | grep {addresses['emil']}", timeout=10)
    admin("nodes rename emily emil")
    wait_for(lambda: "emil" in peers(dora, "tailscale"), "dora sees the old name again")

with subtest("stock: an expired key is told, and a new login heals it"):
    admin("nodes expire emil")
    wait_for(lambda: peers(dora, "tailscale")["emil"].get("Expired"), "dora knows that emil's key has expired")
    wait_for(
        lambda: status(emil, "tailscale")["BackendState"] == "NeedsLogin",
        "emil knows that it has to log in",
    )
    join(emil, "tailscale up --force-reauth")
    wait_for(lambda: not peers(dora, "tailscale")["emil"].get("Expired"), "dora sees the new key")
    assert emil.succeed("tailscale ip -4").strip() == addresses["emil"], "emil keeps its address"
    dora.succeed("ping -c 1 -W 10 emil", timeout=20)

with subtest("stock: a restart of the coordinator hurts nobody"):
    hub.systemctl("restart lacis-coordinator.service")
    dora.succeed("ping -c 2 -i 0.2 -W 5 emil", timeout=20)
    admin("nodes rename emil emilio")
    wait_for(lambda: "emilio" in peers(dora, "tailscale"), "dora hears of changes again", timeout=60)
    admin("nodes rename emilio emil")
    wait_for(lambda: "emil" in peers(dora, "tailscale"), "dora hears of further changes", timeout=60)

# ---- and lacisd ----

with subtest("lacisd joins"):
    lena.wait_for_unit("lacisd.service", timeout=30)
    join(lena, "lacis up")
    addresses["lena"] = lena.succeed("lacis ip -4").strip()
    for name in STOCK:
        wait_for(lambda: name in peers(lena), f"lena sees {name}")
        wait_for(lambda: "lena" in peers(STOCK[name], "tailscale"), f"{name} sees lena")

with subtest("lacisd and tailscaled ping each other, by disco and by ICMP"):
    for name, machine in STOCK.items():
        said = lena.succeed(f"lacis ping -c 2 --until-direct=false {name}", timeout=20)
        assert re.search(rf"pong from {name} \({addresses[name]}\) via DERP\(rly\) in \d+ ?ms", said), said
        said = machine.succeed("tailscale ping -c 2 --until-direct=false lena", timeout=20)
        assert f"pong from lena ({addresses['lena']}) via DERP(rly)" in said, said
        lena.succeed(f"ping -c 2 -i 0.2 -W 5 {name}", timeout=20)
        machine.succeed("ping -c 2 -i 0.2 -W 5 lena", timeout=20)

with subtest("lacisd and tailscaled copy data both ways"):
    copy(lena, dora, "dora", 7001)
    copy(dora, lena, "lena", 7002)

with subtest("lacisd resolves names"):
    for name in ("dora", "emil", "lena"):
        assert lena.succeed(f"dig +short @100.100.100.100 {name}.{DOMAIN}").split() == [addresses[name]]
        assert lena.succeed(f"dig +tcp +short @100.100.100.100 {name}.{DOMAIN}").split() == [addresses[name]]
    assert lena.succeed(f"dig +short @100.100.100.100 -x {addresses['emil']}").strip() == f"emil.{DOMAIN}."
    assert "NXDOMAIN" in lena.succeed(f"dig @100.100.100.100 nobody.{DOMAIN}")
    assert dora.succeed(f"dig +short @100.100.100.100 lena.{DOMAIN}").split() == [addresses["lena"]]

with subtest("Tailscale's command works against lacisd"):
    assert "dora" in lena.succeed(f"{LACISD} status")
    assert "dora" in peers(lena, LACISD)
    assert lena.succeed(f"{LACISD} ip -4").strip() == addresses["lena"]
    assert lena.succeed(f"{LACISD} ip -4 dora").strip() == addresses["dora"]
    said = lena.succeed(f"{LACISD} ping -c 1 --until-direct=false dora", timeout=20)
    assert "pong from dora" in said, said
    said = json.loads(lena.succeed(f"{LACISD} whois --json {addresses['dora']}"))
    assert said["Node"]["Name"] == f"dora.{DOMAIN}.", said
    assert "* UDP: false" in lena.succeed(f"{LACISD} netcheck 2>&1", timeout=30)
    lena.succeed(f"{LACISD} down")
    lena.fail(f"{LACISD} status")
    lena.succeed(f"{LACISD} up", timeout=30)
    lena.succeed("ping -c 1 -W 10 dora", timeout=20)
    lena.succeed(f"{LACISD} set --hostname=lenya")
    wait_for(lambda: "lenya" in peers(dora, "tailscale"), "dora sees lena's new name")
    lena.succeed(f"{LACISD} set --hostname=")
    wait_for(lambda: "lena" in peers(dora, "tailscale"), "dora sees lena's old name again")

with subtest("Tailscale's command logs lacisd out and in"):
    lena.succeed(f"{LACISD} logout", timeout=20)
    wait_for(
        lambda: status(lena)["BackendState"] == "NeedsLogin", "lena is logged out"
    )
    join(lena, f"{LACISD} up")
    lena.succeed("ping -c 1 -W 10 dora", timeout=20)

with subtest("a restarted coordinator hurts neither kind"):
    hub.systemctl("restart lacis-coordinator.service")
    lena.succeed("ping -c 2 -i 0.2 -W 5 dora", timeout=20)
    admin("nodes rename dora dorothy")
    wait_for(lambda: "dorothy" in peers(lena), "lena hears of changes again", timeout=60)
