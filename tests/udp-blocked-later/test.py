"""Alice pings bob all the time, while her router is told to block UDP, to reboot, and to let UDP through again."""

import re
import time
from itertools import pairwise

URL = "https://mesh.example.org"
# Pings a second.
RATE = 5
# Seconds: until the relay carries what the direct path no longer does, and until a path that could be direct is.
FALLBACK, UPGRADE = 6, 70
BLOCK = [
    "nft add table inet later",
    "nft add chain inet later through '{ type filter hook forward priority -20; }'",
    "nft add rule inet later through meta l4proto udp drop",
]


def answers():
    """The answers so far: when each came, and which ping it answers."""
    lines = alice.succeed("cat /tmp/pings").splitlines()
    found = (re.match(r"\[([\d.]+)\] \d+ bytes from .* icmp_seq=(\d+) ", line) for line in lines)
    return [(float(match[1]), int(match[2])) for match in found if match]


def answered_since(mark):
    return [when for when, _ in answers() if when > mark]


def cost(what, mark, seconds):
    """Says how long no ping was answered since a moment, and how many never were; fails if that is more than `seconds`."""
    now = clock(alice)
    wait_for(lambda: len(answered_since(now)) >= 2 * RATE, f"{what}: pings are answered for 2 s", timeout=30)
    lately = [(when, number) for when, number in answers() if when > mark - 1]
    longest = max(after - before for before, after in pairwise(sorted(when for when, _ in lately)))
    numbers = {number for _, number in lately}
    lost = max(numbers) - min(numbers) + 1 - len(numbers)
    log.info(f"      {what}: no answer for {longest:.1f} s, {lost} pings lost")
    assert longest <= seconds, f"no answer for {longest:.1f} s"
    assert lost <= seconds * RATE, f"{lost} pings lost"


def is_relayed():
    return "via DERP" in alice.succeed("lacis ping --until-direct=false -c 1 bob", timeout=10)


start_all()

with subtest("alice and bob join, and are direct"):
    join(hub, URL, alice, bob)
    alice.succeed("lacis ping bob", timeout=30)
    bob_address = bob.succeed("lacis ip -4").strip()
    alice.succeed(f"ping -D -n -i {1 / RATE} {bob_address} > /tmp/pings 2>&1 &")
    wait_for(lambda: len(answers()) > RATE, "pings are answered")

with subtest("her router reboots: it knows of no connection"):
    mark = clock(alice)
    home.succeed("conntrack -F")
    cost("reboot while direct", mark, 2)
    alice.succeed("lacis ping bob", timeout=30)

with subtest("UDP is blocked: the relay carries on"):
    mark = clock(alice)
    home.succeed(*BLOCK)
    cost("UDP blocked", mark, FALLBACK)
    assert is_relayed()

with subtest("the router reboots again"):
    mark = clock(alice)
    home.succeed("conntrack -F")
    cost("reboot while relayed", mark, 2)
    assert is_relayed()

with subtest("UDP is let through again: the path becomes direct"):
    mark, began = clock(alice), time.monotonic()
    home.succeed("nft delete table inet later")
    for machine, name in ((alice, "bob"), (bob, "alice")):
        wait_for(lambda: way(machine, name), f"{machine.name} is direct", timeout=UPGRADE)
    log.info(f"      direct after {time.monotonic() - began:.1f} s")
    cost("UDP let through", mark, 1)
    alice.succeed("lacis ping -c 1 bob", timeout=10)
