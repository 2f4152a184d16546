"""A printer that runs nothing of ours is reached through a machine of its network that does."""

URL = "https://mesh.example.org"
# Seconds until a change of routes or rules is seen by every client.
SOON = 2


def admin(command):
    return hub.succeed(f"lacis admin {command}", timeout=20)


def forwarding(machine, on):
    machine.succeed(f"echo {on} > /proc/sys/net/ipv4/ip_forward; echo {on} > /proc/sys/net/ipv6/conf/all/forwarding")


def approve(name, prefixes):
    return lambda: admin(f"nodes approve-routes {name} --routes '{','.join(prefixes)}'")


def download(machine, host, port=8080):
    """Two megabytes from where `python3 -m http.server` serves /tmp."""
    machine.succeed(f"curl -fsS -m 30 -o /tmp/downloaded {url_of(host, port)}original")
    assert machine.succeed("sha256sum < /tmp/downloaded") == printer.succeed("sha256sum < /tmp/original")


start_all()

with subtest("alice and gate join; the printer serves its own network"):
    join(hub, URL, alice, gate)
    mirror(printer)
    printer.succeed("head -c 2M /dev/urandom > /tmp/original")
    printer.succeed("python3 -m http.server --bind :: --directory /tmp 8080 > /dev/null 2>&1 &")
    printer.wait_for_open_port(8080, timeout=10)
    lan4, lan6 = (f"{address(office, 'lan').rsplit('.', 1)[0]}.0/24", f"{address(office, 'lan', 6)[:-1]}/64")
    # Where the printer is, and who its visitors are to it.
    printers = {address(printer, family=family): address(gate, family=family) for family in (4, 6)}
    printer4, printer6 = printers
    for host, shown in printers.items():
        assert seen_by(host, gate) == shown
        assert not reaches(alice, host)

with subtest("a router without forwarding says so"):
    forwarding(gate, 0)
    said = gate.succeed(f"lacis set --advertise-routes={lan4},{lan6} 2>&1; lacis status 2>&1")
    assert "ip_forward" in said, f"nobody says what is missing: {said}"
    log.info("\n".join(f"      {line}" for line in said.splitlines() if "forward" in line))
    forwarding(gate, 1)
    gate.wait_until_fails("lacis status 2>&1 | grep ip_forward", timeout=15)

with subtest("what is advertised is nothing until it is approved"):
    alice.succeed("lacis set --accept-routes")
    hub.wait_until_succeeds(f"lacis admin nodes show gate --json | grep {lan4}", timeout=10)
    assert not {lan4, lan6} & routes(alice), routes(alice)
    assert not reaches(alice, printer4)

with subtest("approved by hand: the printer is reached, and sees the router"):
    within(SOON, approve("gate", [lan4, lan6]), lambda: {lan4, lan6} <= routes(alice), "alice has the routes")
    for host, shown in printers.items():
        alice.succeed(f"ping -c 2 -i 0.2 -W 5 {host}", timeout=20)
        assert seen_by(host, alice) == shown
        download(alice, host)
        copy(alice, printer, host, 7000 if host == printer4 else 7001)

with subtest("directly, not by relay alone"):
    alice.succeed("lacis ping gate", timeout=30)
    download(alice, printer4)

with subtest("whoever accepts no routes has none"):
    refuse = lambda: alice.succeed("lacis set --accept-routes=false")
    within(SOON, refuse, lambda: not {lan4, lan6} & routes(alice), "alice has no routes")
    assert not reaches(alice, printer4) and not reaches(alice, printer6)
    accept = lambda: alice.succeed("lacis set --accept-routes")
    within(SOON, accept, lambda: reaches(alice, printer4), "alice reaches the printer")

with subtest("without SNAT the printer sees alice herself, and reaches her"):
    mirror(alice)
    meshed = {printer4: alice.succeed("lacis ip -4").strip(), printer6: alice.succeed("lacis ip -6").strip()}
    gate.succeed("lacis set --snat-subnet-routes=false")
    printer.succeed(
        f"ip -4 route add 100.64.0.0/10 via {printers[printer4]}",
        f"ip -6 route add fd7a:115c:a1e0::/48 via {printers[printer6]}",
    )
    for host, own in meshed.items():
        wait_for(lambda: reaches(alice, host), f"alice reaches {host}")
        assert seen_by(host, alice) == own
        assert seen_by(own, printer) == host
    gate.succeed("lacis set --snat-subnet-routes=true")
    printer.succeed("ip -4 route del 100.64.0.0/10", "ip -6 route del fd7a:115c:a1e0::/48")
    for host, shown in printers.items():
        wait_for(lambda: reaches(alice, host), f"alice reaches {host} through SNAT again")
        assert seen_by(host, alice) == shown

with subtest("the router's daemon restarts"):
    gate.systemctl("restart lacisd.service")
    gate.wait_for_unit("lacisd.service", timeout=30)
    began = time.monotonic()
    wait_for(lambda: reaches(alice, printer4), "alice reaches the printer again", timeout=30)
    log.info(f"      reached {time.monotonic() - began:.1f} s after the restart")

with subtest("one of the two is withdrawn, then the other"):
    gone = lambda: lan6 not in routes(alice)
    within(SOON, approve("gate", [lan4]), gone, "the IPv6 route is gone")
    assert reaches(alice, printer4, limit=5) and not reaches(alice, printer6)
    within(SOON, approve("gate", []), lambda: lan4 not in routes(alice), "the IPv4 route is gone")
    assert not reaches(alice, printer4)

EVERYTHING = [{"action": "accept", "src": ["*"], "dst": ["*:*"]}]

with subtest("a policy approves by itself"):
    approving = {"acls": EVERYTHING, "autoApprovers": {"routes": {lan4: ["autogroup:member"], lan6: ["autogroup:member"]}}}
    within(
        SOON, lambda: set_policy(hub, approving), lambda: {lan4, lan6} <= routes(alice), "alice has the routes again"
    )
    for host, shown in printers.items():
        assert seen_by(host, alice) == shown

with subtest("a policy lets one port through, and only to whom it says"):
    only = [
        {"action": "accept", "src": ["autogroup:member"], "dst": ["autogroup:member:*", f"{printer4}/32:8000"]},
    ]
    blocked = lambda: not reaches(alice, printer4, 8080, limit=0.5)
    within(SOON + 0.5, lambda: set_policy(hub, {**approving, "acls": only}), blocked, "port 8080 is closed")
    assert reaches(alice, printer4, 8000)
    assert not reaches(alice, printer6, 8000)
    alice.succeed("ping -c 1 -W 5 gate", timeout=10)
    within(SOON, lambda: set_policy(hub, approving), lambda: reaches(alice, printer4, 8080), "port 8080 is open")

if present("dora"):
    with subtest("tailscaled uses our router"):
        enter(hub, URL, dora, "tailscale")
        assert not reaches(dora, printer4)
        dora.succeed("tailscale set --accept-routes")
        for host, shown in printers.items():
            wait_for(lambda: reaches(dora, host), f"dora reaches {host}")
            dora.succeed(f"ping -c 2 -i 0.2 -W 5 {host}", timeout=20)
            assert seen_by(host, dora) == shown
            download(dora, host)
        set_policy(hub, {"acls": EVERYTHING})
        within(SOON, approve("gate", []), lambda: not {lan4, lan6} & routes(dora), "dora's routes are gone")
        within(SOON, approve("gate", [lan4, lan6]), lambda: {lan4, lan6} <= routes(dora), "dora has the routes again")

if present("emil"):
    with subtest("tailscaled is a router of ours"):
        mirror(till)
        forwarding(emil, 1)
        enter(hub, URL, emil, "tailscale")
        shop4 = f"{address(shop, 'lan').rsplit('.', 1)[0]}.0/24"
        emil.succeed(f"tailscale set --advertise-routes={shop4}")
        hub.wait_until_succeeds(f"lacis admin nodes show emil --json | grep {shop4}", timeout=10)
        assert shop4 not in routes(alice)
        within(SOON, approve("emil", [shop4]), lambda: shop4 in routes(alice), "alice has the shop's route")
        alice.succeed(f"ping -c 2 -i 0.2 -W 5 {address(till)}", timeout=20)
        assert seen_by(address(till), alice) == address(emil)
        copy(alice, till, address(till))
        within(SOON, approve("emil", []), lambda: shop4 not in routes(alice), "the shop's route is gone")
