"""Alice's router drops TCP to south, bob's drops TCP to north; STUN passes everywhere, and nothing else by UDP."""

URL = "https://mesh.example.org"


# Rules of a router: STUN passes, and nothing else by UDP.
STUN_ONLY = [
    "nft add rule inet wall through udp dport 3478 accept",
    "nft add rule inet wall through udp sport 3478 accept",
    "nft add rule inet wall through meta l4proto udp drop",
]


def drop_tcp(router, relay):
    router.succeed(f"nft add rule inet wall through ip daddr {address(relay)} tcp dport 443 drop")


def home_of(machine):
    return status(machine)["Self"]["Relay"]


def health(machine):
    return status(machine)["Health"] or []


def relayed_by(machine, peer):
    return machine.execute(f"lacis ping --until-direct=false -c 1 --timeout=2s {peer}", timeout=10)[1]


def moves(machine):
    # `grep -c` prints 0 and ends 1 where there is none.
    return int(machine.succeed("journalctl -u lacisd | grep -c 'home relay' || true"))


start_all()

with subtest("coordinator and relays are up, and the routers drop TCP to one relay each"):
    for router in (home, office):
        router.succeed(
            "nft add table inet wall",
            "nft add chain inet wall through '{ type filter hook forward priority -20; }'",
            *STUN_ONLY,
        )
        # East is away while homes are chosen: all relays are equally near here.
        router.succeed(
            "nft add table inet early",
            "nft add chain inet early through '{ type filter hook forward priority -21; }'",
            f"nft add rule inet early through ip daddr {address(east)} drop",
        )
    drop_tcp(home, south)
    drop_tcp(office, north)
    for machine in (north, south, east):
        machine.wait_for_unit("lacis-relay.service", timeout=30)

with subtest("home is a relay that can be used, whatever answers STUN first"):
    join(hub, URL, alice, bob)
    assert home_of(alice) == "nor" and home_of(bob) == "sou", (home_of(alice), home_of(bob))
    for router, machine in ((home, alice), (office, bob)):
        router.succeed("nft delete table inet early")
        machine.systemctl("restart lacisd.service")
        machine.wait_for_unit("lacisd.service", timeout=30)

with subtest("each cannot use the other's home, and both meet at the third relay"):
    alice.wait_until_succeeds("ping -c 1 -W 1 bob", timeout=20)
    bob.wait_until_succeeds("ping -c 1 -W 1 alice", timeout=20)
    said = relayed_by(alice, "bob")
    assert "via DERP(eas)" in said, said

with subtest("status and netcheck name the relay"):
    wait_for(lambda: any("relay sou cannot be reached" in line for line in health(alice)), "health names it", timeout=10)
    said = alice.succeed("lacis netcheck", timeout=20)
    assert "(South) unreachable: " in said and "UDP: true" in said, said

if present("carol"):
    with subtest("a stock client reaches both"):
        enter(hub, URL, carol, "tailscale")
        for name in ("alice", "bob"):
            carol.wait_until_succeeds(f"ping -c 1 -W 1 {name}", timeout=20)

with subtest("alice's home falls silent: another within 10 s, and bob is reached again"):
    before = moves(alice)
    within(10.5, lambda: drop_tcp(home, north), lambda: home_of(alice) == "eas", "another home")
    alice.wait_until_succeeds("ping -c 1 -W 1 bob", timeout=10)
    bob.succeed("ping -c 1 -W 2 alice")
    assert any("relay nor cannot be reached, although it answers STUN" in line for line in health(alice)), health(alice)

with subtest("the way is free again: nothing is named any more, peers' homes are used, and nobody moves about"):
    for router in (home, office):
        router.succeed("nft flush chain inet wall through", *STUN_ONLY)
    wait_for(lambda: not health(alice) and not health(bob), "health is empty", timeout=30)
    wait_for(lambda: "via DERP(sou)" in relayed_by(alice, "bob"), "alice reaches bob at his home", timeout=15)
    assert moves(alice) <= before + 2, alice.succeed("journalctl -u lacisd | grep 'home relay'")
