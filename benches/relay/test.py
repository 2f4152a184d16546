"""Figures of a relayed network, ours (benches/relay) or the strangers' (benches/relay-tailscale): the same script."""

import json
import statistics
import time

URL = "https://mesh.example.org"
ROUNDS = 5
SECONDS = 6
CLIENTS = {"alice": alice, "bob": bob, "carol": carol}
OURS = "lacisd" in alice.units
COMMAND = "lacis" if OURS else "tailscale"
DAEMON = f"{COMMAND}d.service"
SERVER = "lacis-coordinator.service" if OURS else "headscale.service"
RELAY = "lacis-relay.service" if OURS else "derper.service"


def new_user_with_key():
    """A reusable key, so that each client can join again and again."""
    if OURS:
        hub.succeed("lacis admin users create family")
        said = hub.succeed("lacis admin keys create --user family --reusable --json")
    else:
        user = json.loads(hub.succeed("headscale users create family -o json"))["id"]
        said = hub.succeed(f"headscale preauthkeys create --user {user} --reusable --expiration 1h -o json")
    return json.loads(said)["key"]


def up(machine):
    """Seconds until `up` returned."""
    began = time.monotonic()
    machine.succeed(f"{COMMAND} up --login-server={URL} --auth-key=file:/tmp/auth-key", timeout=60)
    return time.monotonic() - began


def memory(machine, unit, field="VmRSS"):
    """MiB of a unit's process."""
    process = machine.get_unit_property(unit, "MainPID")
    return int(machine.succeed(f"grep {field} /proc/{process}/status").split()[1]) / 1024


def told(what, values, unit):
    """Prints the median and what it is the median of."""
    log.info(f"{what}: {statistics.median(values):.2f} {unit} (of {', '.join(f'{value:.2f}' for value in values)})")


start_all()
hub.wait_for_unit(SERVER, timeout=30)
derp.wait_for_unit(RELAY, timeout=30)
hub.wait_for_open_port(443, timeout=30)
key = new_user_with_key()
for machine in CLIENTS.values():
    machine.wait_for_unit(DAEMON, timeout=30)
    machine.succeed(f"umask 077; printf %s {key} > /tmp/auth-key")

# A client may be measured before anybody else is there, and the first time is what a person sees.
times = {"alice": [], "carol": []}
first_ping = []
up(bob)
for _ in range(ROUNDS):
    for name, values in times.items():
        values.append(up(CLIENTS[name]))
    bob.succeed(f"{COMMAND} logout", timeout=30)
    alice.succeed("sleep 0.5")
    up(bob)
    address = bob.succeed(f"{COMMAND} ip -4").strip()
    began = time.monotonic()
    alice.wait_until_succeeds(f"ping -c 1 -W 1 {address}", timeout=60)
    first_ping.append(time.monotonic() - began)
    for name in times:
        CLIENTS[name].succeed(f"{COMMAND} logout", timeout=30)
told("up until it returns, UDP blocked", times["alice"], "s")
told("up until it returns, in the open", times["carol"], "s")
told("first ping answered after both joined", first_ping, "s")

up(alice)
up(carol)
alice.wait_until_succeeds(f"ping -c 1 -W 1 {address}", timeout=60)
alice.succeed("sleep 5")
told("idle client, resident", [memory(machine, DAEMON) for machine in CLIENTS.values()], "MiB")
told("idle server, resident", [memory(hub, SERVER)], "MiB")

speeds, retransmits = [], []
for _ in range(3):
    bob.succeed("iperf3 --server --one-off --daemon")
    bob.wait_until_succeeds("ss -ltn | grep -w 5201", timeout=10)
    said = json.loads(alice.succeed(f"iperf3 --client {address} --time {SECONDS} --json", timeout=60))
    speeds.append(said["end"]["sum_received"]["bits_per_second"] / 1e9)
    retransmits.append(said["end"]["sum_sent"]["retransmits"])
told("TCP through the relay, one stream", speeds, "Gb/s")
told(f"retransmits in {SECONDS} s", retransmits, "segments")
told("client after it, highest resident", [memory(machine, DAEMON, "VmHWM") for machine in (alice, bob)], "MiB")
told("relay after it, highest resident", [memory(derp, RELAY, "VmHWM")], "MiB")
