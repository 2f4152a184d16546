"""Other programs sweep away alice's rules, routes, firewall and device: all is put back at once, and her daemon's end too."""

import re

URL = "https://mesh.example.org"
# Seconds until what was taken away is back: what lacisd takes, and a busy laboratory.
SOON = 1.5
# Prints the seconds until alice's host looks as it did, looking every few milliseconds.
WATCH = """
import subprocess, sys, time
look = "ip -4 rule; ip -6 rule; ip -4 route show table 52; ip -6 route show table 52; nft list table inet lacis; ip -br address show dev lacis0 scope global"
def state():
    text = subprocess.run(look, shell=True, capture_output=True, text=True).stdout
    # Link-local addresses and the order of rules do not matter.
    return sorted(line.strip() for line in text.splitlines())
before = state()
subprocess.run(sys.argv[1], shell=True, check=True)
began = time.monotonic()
if len(sys.argv) > 2 and state() == before:
    sys.exit("nothing was taken away")
while state() != before:
    if time.monotonic() - began > 8:
        sys.exit("not back after 8 s: " + repr(set(before) ^ set(state())))
    time.sleep(0.01)
print(time.monotonic() - began)
"""
SWEEPS = {
    "one rule": "ip -4 rule del pref 5270; ip -6 rule del pref 5270",
    "all rules of ours": "for f in 4 6; do for p in 5210 5230 5250 5270 5280; do ip -$f rule del pref $p; done; done",
    "the routes": "ip -4 route flush table 52; ip -6 route flush table 52",
    "the firewall": "nft flush ruleset",
    "the device, set down": "ip link set lacis0 down",
    "the addresses": "ip address flush dev lacis0 scope global",
    "all at once": "ip link set lacis0 down; ip -4 rule del pref 5210; ip -4 route flush table 52; nft flush ruleset",
}


def health(machine):
    return status(machine).get("Health") or []


def says(machine, words):
    wait_for(lambda: any(words in line for line in health(machine)), f"health says {words}")


def is_well(machine):
    wait_for(lambda: not health(machine), "health is empty again")


def host_state(machine):
    look = "for f in 4 6; do ip -$f rule; ip -$f route show table all; done; nft list ruleset; cat /etc/resolv.conf"
    lines = (re.sub(r" (expires|hoplimit) \w+", "", line).strip() for line in machine.succeed(look).splitlines())
    # The device itself is gone with its daemon.
    return sorted(line for line in lines if "dev lacis0" not in line and not line.startswith("local fe80:"))


def bob_answers():
    """Bob is reached by both families, and by a path of alice's own."""
    for ip in bob_ips:
        alice.succeed(f"ping -c 1 -W 5 {ip}")
    alice.succeed("lacis ping bob", timeout=10)


start_all()

with subtest("alice and bob join"):
    valid_mark = "cat /proc/sys/net/ipv4/conf/all/src_valid_mark"
    alice.wait_for_unit("lacisd.service", timeout=30)
    without, mark_without = host_state(alice), alice.succeed(valid_mark)
    join(hub, URL, alice, bob)
    bob_ips = bob.succeed("lacis ip").split()
    put(alice, "/tmp/watch.py", WATCH)
    bob_answers()
    is_well(alice)

with subtest("what is swept away is back at once"):
    for what, sweep in SWEEPS.items():
        took = float(alice.succeed(f"python3 /tmp/watch.py '{sweep}'", timeout=20))
        log.info(f"      {what}: back after {took:.2f} s")
        assert took < SOON, f"{what}: back after {took:.2f} s"
    bob_answers()
    is_well(alice)

with subtest("a full tunnel that is brought up later takes neither the mesh nor lacisd's own packets"):
    alice.succeed("ip tuntap add wg0 mode tun; ip address add 10.99.0.2/32 dev wg0; ip link set wg0 up")
    tunnel = "; ".join(
        f"ip -{f} rule {{0}} not fwmark 51820 table 51820; ip -{f} rule {{0}} table main suppress_prefixlength 0"
        for f in (4, 6)
    )
    routes_of_theirs = "; ".join(f"ip -{f} route add default dev wg0 table 51820" for f in (4, 6))
    alice.succeed(f"{tunnel.format('add')}; {routes_of_theirs}")
    says(alice, "not from all fwmark 0xca6c lookup 51820")
    bob_answers()
    for there, device in ((bob_ips[0], "lacis0"), ("192.0.2.1", "wg0"), ("192.0.2.1 mark 0x80000", "eth0")):
        found = alice.succeed(f"ip route get {there}")
        assert f"dev {device}" in found, f"{there} does not leave by {device}: {found}"
    hub.systemctl("restart lacis-coordinator.service")
    hub.wait_for_unit("lacis-coordinator.service", timeout=30)
    hub.succeed("lacis admin nodes rename bob bert", timeout=20)
    wait_for(lambda: "bert" in peers(alice), "alice hears of changes", timeout=30)
    hub.succeed("lacis admin nodes rename bert bob", timeout=20)
    wait_for(lambda: "bob" in peers(alice), "alice hears of further changes")
    alice.succeed(tunnel.format("del"))
    is_well(alice)

with subtest("one that was there before is left as it is"):
    alice.succeed("lacis down", f"{tunnel.format('add')}; {routes_of_theirs.replace('add', 'replace')}", "lacis up")
    wait_for(lambda: status(alice)["BackendState"] == "Running", "alice runs")
    wait_for(lambda: alice.execute(f"ping -c 1 -W 1 {bob_ips[0]}")[0] == 0, "bob answers")
    assert "dev wg0" in alice.succeed("ip route get 192.0.2.1")
    is_well(alice)
    alice.succeed(f"{tunnel.format('del')}; ip link del wg0")

with subtest("what cannot be put back is named until it is there again"):
    for take, words, give in (
        ("echo 1 > /proc/sys/net/ipv6/conf/lacis0/disable_ipv6", "IPv6 is switched off", "echo 0 > /proc/sys/net/ipv6/conf/lacis0/disable_ipv6"),
        ("ip link set lacis0 mtu 1000", "the MTU of lacis0 is 1000", "ip link set lacis0 mtu 1280"),
        ("ip link set lacis0 down name mesh0 up", "is called mesh0 now", "ip link set mesh0 down name lacis0 up"),
    ):
        alice.succeed(take)
        says(alice, words)
        alice.succeed(give)
        is_well(alice)
        wait_for(lambda: bob_answers() is None, "bob answers")

with subtest("a program that insists is named, and leaves lacisd in peace"):
    # lacisd may not have put the rule back yet.
    alice.succeed("for i in $(seq 100); do ip rule del pref 5270 2> /dev/null || true; sleep 0.02; done")
    says(alice, "another program keeps changing")
    wait_for(lambda: not health(alice), "health is empty again", timeout=30)
    bob_answers()

with subtest("killed, a host is put back by hand or by the next stop"):
    alice.succeed("lacis set --accept-routes")
    bob.succeed("lacis set --advertise-routes=10.77.0.0/24")
    hub.wait_until_succeeds("lacis admin nodes approve-routes bob --routes 10.77.0.0/24", timeout=10)
    wait_for(lambda: "10.77.0.0/24" in routes(alice), "alice has bob's network")
    wait_for(lambda: alice.succeed(valid_mark) == "1\n", "marks count")
    said = alice.fail("lacisd --cleanup 2>&1")
    assert "lacisd" in said and "stop" in said, said
    for put_back in ("start", "cleanup"):
        alice.systemctl("kill --signal=SIGKILL lacisd.service")
        alice.wait_until_fails("ip link show lacis0", timeout=5)
        if put_back == "cleanup":
            alice.systemctl("stop lacisd.service")
            alice.succeed("lacisd --cleanup")
        else:
            alice.wait_until_succeeds("lacis status", timeout=20)
            wait_for(lambda: "10.77.0.0/24" in routes(alice), "alice has bob's network again", timeout=20)
            alice.systemctl("stop lacisd.service")
        assert host_state(alice) == without, set(host_state(alice)) ^ set(without)
        assert alice.succeed(valid_mark) == mark_without
        alice.systemctl("start lacisd.service")
        wait_for(lambda: "10.77.0.0/24" in routes(alice), "alice has bob's network again", timeout=20)
