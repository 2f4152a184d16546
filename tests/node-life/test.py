"""The life of a node: how it joins, is renamed, expires, logs out and in, and is deleted. Logouts also in a network of
Headscale, where its program is given."""

import json

URL = "https://mesh.example.org"
DOMAIN = "lab.example.org"


def admin(command):
    return hub.succeed(f"lacis admin {command}", timeout=20)


def new_key(machine, flags=""):
    key = json.loads(admin(f"keys create --user family {flags} --json"))["key"]
    machine.succeed(f"umask 077; printf %s {key} > /tmp/auth-key")


def up(machine, flags="", url=URL):
    machine.succeed(
        f"lacis up --login-server={url} --auth-key=file:/tmp/auth-key --timeout=20s {flags}", timeout=30
    )


def node(name):
    """What the coordinator has of a node; nothing when it has none."""
    found = [node for node in json.loads(admin("nodes list --json")) if node["name"] == name]
    return found[0] if found else None


def log_out(machine):
    """Logs out, and says how long that took and what the machine was warned of."""
    began = time.monotonic()
    said = machine.succeed("lacis logout 2>&1", timeout=20)
    log.info(f"      {machine.name} logged out after {time.monotonic() - began:.2f} s")
    assert status(machine)["BackendState"] == "NeedsLogin"
    return said


def start_from_copy(machine):
    """Puts the copy of the state directory back that was made before the logout."""
    machine.systemctl("stop lacisd.service")
    machine.succeed("rm -rf /var/lib/lacis/* && cp -a /tmp/copy/. /var/lib/lacis/")
    machine.systemctl("start lacisd.service")
    machine.wait_for_unit("lacisd.service", timeout=30)
    wait_for(lambda: status(machine)["BackendState"] == "NeedsLogin", f"the copy of {machine.name} has to log in")


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

# As the documents have it, for services that bind the mesh's address.
until = "until ip -4 -o address show dev lacis0 2>/dev/null | grep -q inet; do sleep 1; done"
alice.succeed(f"{{ {until}; touch /tmp/has-address; }} > /dev/null 2>&1 &")

with subtest("two nodes join"):
    for machine in (alice, bob):
        new_key(machine)
        up(machine)
    address = alice.succeed("lacis ip -4").strip()
    alice.wait_until_succeeds("test -e /tmp/has-address", timeout=5)
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

with subtest("no node is called as the coordinator is, nor as hosts call themselves"):
    for name in ("mesh", "localhost"):
        up(alice, f"--hostname={name}")
        wait_for(lambda: f"node-{name}" in peers(bob), f"bob sees that alice is not called {name}")
        said = hub.fail(f"lacis admin nodes rename bob {name} 2>&1", timeout=20)
        assert "choose another" in said, said
    up(alice, "--reset")
    wait_for(lambda: "alice" in peers(bob), "bob sees the machine's own name again")

with subtest("two machines with one copied state are named to both and to the administrator"):
    copy = alice.succeed("tar -C /var/lib/lacis -cz . | base64 -w0").strip()
    guest.systemctl("stop lacisd.service")
    guest.succeed(f"rm -rf /var/lib/lacis/* && echo {copy} | base64 -d | tar -C /var/lib/lacis -xz")
    guest.systemctl("start lacisd.service")
    guest.wait_for_unit("lacisd.service", timeout=30)

    def warned(machine):
        return [line for line in status(machine)["Health"] if "two machines" in line]

    wait_for(lambda: warned(alice) and warned(guest), "both know of each other", timeout=25)
    log.info(f"      {warned(alice)[0]}")
    assert "online, copied" in admin("nodes list")
    copied = [node for node in json.loads(admin("nodes list --json")) if node.get("copies")]
    assert len(copied) == 1 and len(copied[0]["copies"]) == 2, copied
    hub.succeed("journalctl -u lacis-coordinator | grep 'two machines use'")
    guest.systemctl("stop lacisd.service")
    guest.succeed("rm -rf /var/lib/lacis/*")
    wait_for(lambda: not warned(alice), "alice is alone again", timeout=30)
    assert "copied" not in admin("nodes list")
    guest.systemctl("start lacisd.service")
    guest.wait_for_unit("lacisd.service", timeout=30)
    # Nobody else says now what alice is called.
    alice.systemctl("restart lacisd.service")
    alice.wait_for_unit("lacisd.service", timeout=30)
    wait_for(lambda: "alice" in peers(bob), "bob sees alice by her name")
    bob.wait_until_succeeds("ping -c 1 -W 1 alice", timeout=15)

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

with subtest("logout expires the node's key at once, and a login with a new key heals it"):
    alice.succeed("rm -rf /tmp/copy && cp -a /var/lib/lacis /tmp/copy")
    assert log_out(alice) == "", "there is nothing to warn of"
    assert node("alice")["expired"], node("alice")
    wait_for(lambda: peers(bob)["alice"].get("Expired"), "bob knows that alice's key has expired")
    bob.fail(f"ping -c 1 -W 2 {address}")
    alice.fail(f"lacis up --login-server={URL} --auth-key=file:/tmp/auth-key --timeout=5s", timeout=20)

with subtest("an old copy of the state does not run on"):
    start_from_copy(alice)
    bob.fail(f"ping -c 1 -W 2 {address}")
    assert node("alice")["expired"], node("alice")
    new_key(alice)
    up(alice)
    bob.wait_until_succeeds("ping -c 1 -W 1 alice", timeout=15)

with subtest("logout deletes an ephemeral node at once, and a copy of it does not run on"):
    guest.start()
    guest.wait_for_unit("lacisd.service", timeout=30)
    new_key(guest, "--ephemeral")
    up(guest, "--force-reauth")
    wait_for(lambda: "guest" in peers(bob), "bob sees guest")
    guest.succeed("rm -rf /tmp/copy && cp -a /var/lib/lacis /tmp/copy")
    assert log_out(guest) == ""
    assert node("guest") is None, node("guest")
    wait_for(lambda: "guest" not in peers(bob), "bob no longer sees guest")
    start_from_copy(guest)
    assert node("guest") is None, node("guest")

with subtest("a logout while the coordinator is away is made good when it is back"):
    hub.systemctl("stop lacis-coordinator.service")
    said = log_out(alice)
    assert "could not be reached" in said and URL in said, said
    assert any("could not be reached" in line for line in status(alice)["Health"]), status(alice)["Health"]
    # It is kept over a restart.
    alice.systemctl("restart lacisd.service")
    alice.wait_for_unit("lacisd.service", timeout=30)
    hub.systemctl("start lacis-coordinator.service")
    hub.wait_for_unit("lacis-coordinator.service", timeout=30)
    wait_for(lambda: node("alice")["expired"], "alice's key is expired", timeout=60)
    wait_for(lambda: not status(alice)["Health"], "alice knows that it is", timeout=15)
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

if present("hs"):

    def headscale(command):
        return json.loads(hs.succeed(f"headscale {command} -o json", timeout=20))

    def enter_headscale(machine, flags=""):
        key = headscale(f"preauthkeys create --user {user} --expiration 1h {flags}")["key"]
        machine.succeed(f"umask 077; printf %s {key} > /tmp/auth-key")
        up(machine, "--force-reauth", "https://hs.example.org")

    def known_to_headscale():
        """The nodes of Headscale by their names. 0.29 and older say `given_name`."""
        found = headscale("nodes list") or []
        return {node.get("givenName", node.get("given_name")): node for node in found}

    def has_expired(node):
        """`expiry` is a time as text, or one of protobuf; in the past from the logout on."""
        expiry = node.get("expiry")
        seconds = expiry.get("seconds", 0) if isinstance(expiry, dict) else 0
        if isinstance(expiry, str):
            seconds = float(hs.succeed(f"date -d '{expiry}' +%s").strip())
        # Go's zero time is no expiry.
        return 0 < seconds <= clock(hs) + 1

    with subtest("two nodes go over to Headscale, and their old network knows that they have left"):
        hs.wait_for_unit("headscale.service", timeout=30)
        hs.wait_for_open_unix_socket("/run/headscale/headscale.sock", timeout=30)
        user = headscale("users create family")["id"]
        enter_headscale(alice)
        wait_for(lambda: node("alice")["expired"], "the coordinator knows that alice has left", timeout=30)
        enter_headscale(guest, "--ephemeral")
        wait_for(lambda: "guest" in peers(alice), "alice sees guest")

    with subtest("a logout deletes an ephemeral node at Headscale, and expires another"):
        for machine in (alice, guest):
            machine.succeed("rm -rf /tmp/copy && cp -a /var/lib/lacis /tmp/copy")
        assert log_out(guest) == ""
        assert "guest" not in known_to_headscale()
        assert log_out(alice) == ""
        assert has_expired(known_to_headscale()["alice"]), known_to_headscale()["alice"]

    with subtest("old copies do not run on at Headscale"):
        for machine in (alice, guest):
            start_from_copy(machine)
        assert "guest" not in known_to_headscale()
