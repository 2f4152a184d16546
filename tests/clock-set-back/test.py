"""A node's clock is wrong while it is restarted, and its peers answer it all the same."""

URL = "https://mesh.example.org"
# Seconds until a restarted node is answered: by a peer like it, which asks back, and by Tailscale's client, which waits
# for the new disco key.
SOON = {"alice": 4, "dora": 15}
LACISD = "lacisd --state-dir /var/lib/lacis --socket /run/lacis/lacisd.sock --tun lacis0 --port 41641"


def run(offset):
    """Restarts bob's daemon with a clock that is off by so much."""
    halt()
    clock = f"faketime --exclude-monotonic -f {offset}" if offset else ""
    start = f"echo $$ > /tmp/lacisd.pid; exec {LACISD}"
    bob.succeed(f"{clock} sh -c '{start}' > /tmp/lacisd.log 2>&1 &")
    bob.wait_until_succeeds("lacis status --json", timeout=20)


def halt():
    if bob.execute("test -e /tmp/lacisd.pid")[0] == 0:
        bob.succeed("kill $(cat /tmp/lacisd.pid); tail --pid $(cat /tmp/lacisd.pid) -f /dev/null; rm /tmp/lacisd.pid", timeout=20)
    else:
        bob.systemctl("stop lacisd.service")


def answered(what, limits):
    """Bob is the one who begins."""
    for name, limit in limits.items():
        within(limit, lambda: None, lambda: bob.execute(f"ping -c 1 -W 1 {addresses[name]}")[0] == 0, f"{what}: {name} answers")


def health():
    return " ".join(status(bob)["Health"] or [])


start_all()

with subtest("all join and remember one another's handshakes"):
    join(hub, URL, alice, bob)
    addresses = {"alice": alice.succeed("lacis ip -4").strip()}
    if present("dora"):
        enter(hub, URL, dora, "tailscale")
        addresses["dora"] = dora.succeed("tailscale ip -4").strip()
    limits = {name: SOON[name] for name in addresses}
    answered("at first", {name: 20 for name in addresses})

with subtest("a clock that is ahead is named"):
    run("+1d")
    wait_for(lambda: "ahead of the control server's" in health(), "bob's health names the clock")
    log.info(f"      {health()}")
    answered("a day ahead", limits)

with subtest("at the true time again: peers have seen later times"):
    run(None)
    answered("right again", limits)
    wait_for(lambda: "clock" not in health(), "nothing is said of the clock")

with subtest("a day behind"):
    run("-1d")
    answered("a day behind", limits)
    wait_for(lambda: "1day behind the control server's" in health(), "bob's health names the clock")

with subtest("once more, and nobody can hand out a new disco key"):
    hub.systemctl("stop lacis-coordinator.service")
    run("-2d")
    wait_for(lambda: "was set back by 1day" in health(), "bob's health names the clock")
    answered("two days behind", {"alice": SOON["alice"]})
    hub.systemctl("start lacis-coordinator.service")
    answered("with the coordinator", limits)
    halt()
