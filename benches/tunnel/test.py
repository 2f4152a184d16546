"""How fast direct tunnels are: none, lacisd's and (if its program is given) tailscaled's in turn, so that all see the
same machine. iperf3 on both ends, a round of each after the other."""

import json
import statistics
import time

URL = "https://mesh.example.org"
ROUNDS = 3
SECONDS = 5
# The payload of small packets, in bytes.
SMALL = 64
# Bytes of socket buffers. iperf3's server loses packets by itself with the kernel's default (208 KiB), also without any
# tunnel, so both are measured.
BUFFERS = 4 << 20
# What ours should reach: TCP as a share of no tunnel and as a multiple of tailscaled's, packets a second.
OF_NONE, OF_TAILSCALED, PACKETS = 0.22, 1.5, 80_000


def join(machine, command):
    machine.wait_for_unit(f"{command}d.service", timeout=30)
    key = json.loads(hub.succeed("lacis admin keys create --user family --json"))["key"]
    machine.succeed(f"umask 077; printf %s {key} > /tmp/auth-key")
    machine.succeed(f"{command} up --login-server={URL} --auth-key=file:/tmp/auth-key", timeout=60)


def iperf(client, server, address, flags):
    """One run; the reports of both sides."""
    server.succeed("rm -f /tmp/iperf && (iperf3 --server --one-off --json > /tmp/iperf 2>&1 &)")
    server.wait_until_succeeds("ss -ltn | grep -w 5201", timeout=10)
    said = client.succeed(f"iperf3 --client {address} --time {SECONDS} --json {flags}", timeout=SECONDS + 60)
    server.wait_until_succeeds("grep -q cpu_utilization_percent /tmp/iperf", timeout=20)
    return json.loads(said)["end"], json.loads(server.succeed("cat /tmp/iperf"))["end"]


def tcp(*ends):
    """Gb/s of one stream."""
    return iperf(*ends, "")[0]["sum_received"]["bits_per_second"] / 1e9


def small(*ends, more=""):
    """Packets a second that arrived, of as many as the client could send."""
    there = iperf(*ends, f"--udp --length {SMALL} --bitrate 0 {more}")[1]["sum"]
    return (there["packets"] - there["lost_packets"]) / there["seconds"]


def packets(*ends):
    """The same, into a socket that holds what comes at once."""
    most = [int(end.succeed(f"cat /proc/sys/net/core/{kind}mem_max")) for end in ends[:2] for kind in "rw"]
    return small(*ends, more=f"--window {min(BUFFERS, *most)}")


start_all()
hub.wait_for_unit("lacis-coordinator.service", timeout=30)
hub.succeed("lacis admin users create family")

# Client, server, and the server's address.
pairs = {"no tunnel": (alice, bob, bob.succeed("ip -4 -brief address show dev eth0").split()[2].split("/")[0])}
tunnels = {"lacisd": ("lacis", alice, bob)}
if "dora" in [machine.name for machine in machines]:
    tunnels["tailscaled"] = ("tailscale", dora, emil)
for name, (command, here, there) in tunnels.items():
    for machine in (here, there):
        join(machine, command)
    pairs[name] = (here, there, there.succeed(f"{command} ip -4").strip())
    # Ends well when the path is direct.
    here.succeed(f"{command} ping -c 20 {there.name}", timeout=60)

busy = float(alice.succeed("cut -d ' ' -f 1 /proc/loadavg"))
if busy > 1.5:
    log.info(f"the machine is busy (load {busy}): what follows is worth little")
KINDS = {"tcp": tcp, "packets": packets, "small": small}
figures = {name: {kind: [] for kind in KINDS} for name in pairs}
for number in range(ROUNDS):
    for kind, measure in KINDS.items():
        for name, ends in pairs.items():
            figures[name][kind].append(measure(*ends))
            time.sleep(0.5)
    log.info(f"round {number + 1} of {ROUNDS}: " + "; ".join(
        f"{name} {of['tcp'][-1]:.2f} Gb/s, {of['packets'][-1]:,.0f} packets/s" for name, of in figures.items()
    ))

for name, (command, here, there) in tunnels.items():
    peers = json.loads(here.succeed(f"{command} status --json"))["Peer"].values()
    assert [peer["CurAddr"] for peer in peers if peer["HostName"] == there.name] != [""], f"{name} is not direct any more"

median = {name: {kind: statistics.median(values) for kind, values in of.items()} for name, of in figures.items()}
none = median["no tunnel"]
log.info(f"\n{'':10}  {'TCP, Gb/s':>9}  {'of none':>7}  {f'{SMALL} B, packets/s':>15}  {'of none':>7}  "
         f"{'default buffers':>15}  {'of none':>7}")
for name, of in median.items():
    share = {kind: of[kind] / none[kind] for kind in KINDS}
    log.info(f"{name:10}  {of['tcp']:9.2f}  {share['tcp']:7.2f}  {of['packets']:15,.0f}  {share['packets']:7.2f}  "
             f"{of['small']:15,.0f}  {share['small']:7.2f}")


def against(what, value, target):
    log.info(f"{what}: {value:,}, wanted {target:,} or more{'' if value >= target else ': MISSED'}")


ours = median["lacisd"]
log.info(f"\nmedians of {ROUNDS} rounds of {SECONDS} s each")
against("TCP, ours of none", round(ours["tcp"] / none["tcp"], 2), OF_NONE)
against("small packets a second, ours", round(ours["packets"]), PACKETS)
if "tailscaled" in median:
    theirs = median["tailscaled"]
    against("TCP, ours of tailscaled's", round(ours["tcp"] / theirs["tcp"], 2), OF_TAILSCALED)
    against("small packets, ours of tailscaled's", round(ours["packets"] / theirs["packets"], 1), 1)
