"""The life of a node: how it joins, is renamed, expires, logs out and in, and is deleted."""

import json

URL = "https://mesh.example.org"
DOMAIN = "lab.example.org"


def admin(command):
    return hub.succeed(f"lacis admin {command}", timeout=20)


def new_key(machine, flags=""):
    key = json.loads(admin(f"keys create --user family {flags} --json"))["key"]
    machine.succeed(f"umask 077; printf %s {key} > /tmp/auth-key")


def up(machine, flags=""):
    machine.succeed(
        f"lacis up --login-server={URL} --auth-key=file:/tmp/auth-key --timeout=20s {flags}", timeout=30
    )


start_all()
hub.wait_for_unit("lacis-coordinator.service", timeout=30)
admin("users create family")
for machine in (alice, bob, guest):
    machine.wait_for_unit("lacisd.service", timeout=30)

with subtest("an unknown key is refused in one line, and soon"):
    alice.succeed("umask 077; echo no-such-key > /tmp/auth-key")
    said = alice.fail(f"lacis up --login-server={URL} --auth-key=file:/tmp/auth-key --timeout=10s 2>&1", timeout=20)
    assert "key" in said, said
    log.info(said.strip())

with subtest("two nodes join"):
    for machine in (alice, bob):
        new_key(machine)
        up(machine)
    address = alice.succeed("lacis ip -4").strip()
    wait_for(lambda: "alice" in peers(bob), "bob sees alice")
    bob.wait_until_succeeds("ping -c 1 -W 1 alice", timeout=15)

with subtest("a used key works for the node that used it, also after a restart"):
    up(alice)
    alice.systemctl("restart lacisd.service")
    alice.wait_for_unit("lacisd.service", timeout=30)
    up(alice)
    assert alice.succeed("lacis ip -4").strip() == address

with subtest("settings of a running node change, and go back to their defaults"):
    up(alice, "--hostname=alix")
    wait_for(lambda: "alix" in peers(bob), "bob sees the name that alice gave herself")
    said = alice.fail("lacis up --accept-dns=false 2>&1", timeout=20)
    assert "--hostname=alix" in said, f"what would be lost is not named: {said}"
    up(alice, "--reset")
    wait_for(lambda: "alice" in peers(bob), "bob sees the machine's own name again")

with subtest("a used key does not work for another node"):
    guest.succeed(f"umask 077; printf %s {alice.succeed('cat /tmp/auth-key').strip()} > /tmp/auth-key")
    guest.fail(f"lacis up --login-server={URL} --auth-key=file:/tmp/auth-key --timeout=5s", timeout=20)

with subtest("an ephemeral node is deleted when it is gone"):
    new_key(guest, "--ephemeral")
    up(guest)
    wait_for(lambda: "guest" in peers(bob), "bob sees guest")
    guest.crash()
    wait_for(lambda: "guest" not in peers(bob), "guest is deleted", timeout=40)
    assert "guest" not in admin("nodes list --json")

with subtest("a rename reaches everybody at once"):
    admin("nodes rename alice alicia")
    wait_for(lambda: "alicia" in peers(bob) and "alice" not in peers(bob), "bob sees the new name")
    bob.wait_until_succeeds(f"dig +short @100.100.100.100 alicia.{DOMAIN} | grep -x {address}", timeout=10)
    assert "NXDOMAIN" in bob.succeed(f"dig @100.100.100.100 alice.{DOMAIN}")
    wait_for(lambda: status(alice)["Self"]["DNSName"].startswith("alicia."), "alice knows her own new name")
    admin(f"nodes rename {address} alice")
    wait_for(lambda: "alice" in peers(bob), "bob sees the old name again")

with subtest("an expired node is cut off until it logs in again"):
    admin("nodes expire alice")
    wait_for(lambda: status(alice)["BackendState"] == "NeedsLogin", "alice knows that she has to log in")
    wait_for(lambda: peers(bob)["alice"].get("Expired"), "bob knows that alice's key has expired")
    bob.fail(f"ping -c 1 -W 2 {address}")
    new_key(alice)
    up(alice, "--force-reauth")
    assert alice.succeed("lacis ip -4").strip() == address, "she keeps her address"
    wait_for(lambda: not peers(bob)["alice"].get("Expired"), "bob sees her new key")
    bob.wait_until_succeeds("ping -c 1 -W 1 alice", timeout=15)

with subtest("down and up"):
    alice.succeed("lacis down")
    alice.fail("lacis status")
    bob.fail(f"ping -c 1 -W 2 {address}")
    alice.succeed("lacis up", timeout=30)
    bob.wait_until_succeeds("ping -c 1 -W 1 alice", timeout=5)

with subtest("logout, and a login with a new key"):
    alice.succeed("lacis logout", timeout=20)
    wait_for(lambda: status(alice)["BackendState"] == "NeedsLogin", "alice is logged out")
    bob.fail(f"ping -c 1 -W 2 {address}")
    alice.fail(f"lacis up --login-server={URL} --auth-key=file:/tmp/auth-key --timeout=5s", timeout=20)
    new_key(alice)
    up(alice)
    bob.wait_until_succeeds("ping -c 1 -W 1 alice", timeout=15)

with subtest("a deleted node is gone, and joins as a new one"):
    admin("nodes delete alice")
    wait_for(lambda: "alice" not in peers(bob), "bob no longer sees alice")
    wait_for(lambda: status(alice)["BackendState"] == "NeedsLogin", "alice knows that she has to log in")
    new_key(alice)
    up(alice)
    wait_for(lambda: "alice" in peers(bob), "bob sees the new alice")
    bob.wait_until_succeeds("ping -c 1 -W 1 alice", timeout=15)
