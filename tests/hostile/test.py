"""A hostile node and a stranger attack. Meanwhile the others keep their network, an honest machine joins, and the
coordinator's and the relay's memory stays bounded. Each attack is one function; all of them run, whichever fails.
"""

import contextlib
import json
import re
import time

URL = "https://mesh.example.org"
PLAIN = "http://plain.example.org"
# MiB that the coordinator and the relay may use at most.
MEMORY = 256
# Seconds in which an honest machine joins, and in which a change reaches the others.
SOON = 5
# Seconds after which a relay of its own has asked the coordinator again about a node that is connected: every ten here,
# and a node that came just after one round began is asked about in the next.
ASKED_AGAIN = 30
# A server that uses more than this is ended, so that a defect costs this scenario and not the machine it runs on.
GUARD = """
import os, signal, sys, time
program, limit = sys.argv[1], int(sys.argv[2]) * 1024
while True:
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            if open(f"/proc/{process}/comm").read().strip() != program[:15]:
                continue
            fields = dict(line.split(":", 1) for line in open(f"/proc/{process}/status"))
            if int(fields.get("VmRSS", "0 kB").split()[0]) > limit:
                os.kill(int(process), signal.SIGKILL)
                print("ended", program, flush=True)
        except OSError:
            pass
    time.sleep(0.05)
"""
# Types of what a node's host facts may have in them, as the stock client decodes them; its optional booleans are
# booleans or absent.
TEXT, FLAG, NUMBER = str, bool, (int, float)
HOSTINFO = {
    **dict.fromkeys(
        ["IPNVersion", "FrontendLogID", "BackendLogID", "OS", "OSVersion", "Env", "Distro", "DistroVersion"], TEXT
    ),
    **dict.fromkeys(["DistroCodeName", "App", "Package", "DeviceModel", "PushDeviceToken", "Hostname"], TEXT),
    **dict.fromkeys(["Machine", "GoArch", "GoArchVar", "GoVersion", "Cloud", "ExitNodeID", "ServicesHash"], TEXT),
    **dict.fromkeys(["Container", "Desktop", "ShieldsUp", "ShareeNode", "NoLogsNoSupport", "WireIngress"], FLAG),
    **dict.fromkeys(["IngressEnabled", "AllowsUpdate", "Userspace", "UserspaceRouter", "AppConnector"], FLAG),
    **dict.fromkeys(["StateEncrypted", "PeerRelay", "RemoteConfig"], FLAG),
    **dict.fromkeys(["RoutableIPs", "RequestTags", "WoLMACs", "Services", "sshHostKeys"], list),
    **dict.fromkeys(["NetInfo", "Location", "TPM"], dict),
}


def admin(command, machine=None):
    return (machine or hub).succeed(f"lacis admin {command}", timeout=20)


def new_key(machine, hub=None, flags=""):
    """Puts a key into a machine's /tmp/auth-key."""
    key = json.loads(admin(f"keys create --user family {flags} --json", hub))["key"]
    machine.succeed(f"umask 077; printf %s {key} > /tmp/auth-key")


# ---- servers ----


SERVERS = {"lacis-coordinator": hub, "lacis-relay": relay}


def process(unit):
    return SERVERS[unit].get_unit_property(f"{unit}.service", "MainPID")


def peak(unit):
    """The most resident memory that a server had, in MiB, and its anonymous memory now."""
    status = SERVERS[unit].succeed(f"cat /proc/{process(unit)}/status")
    kib = {name: int(size) for name, size in re.findall(r"(VmHWM|RssAnon):\s+(\d+) kB", status)}
    return kib["VmHWM"] / 1024, kib["RssAnon"] / 1024


def restarts(unit):
    return int(SERVERS[unit].get_unit_property(f"{unit}.service", "NRestarts"))


# ---- the others ----


@contextlib.contextmanager
def pinging(machine, name, limit):
    """A ping every fifth of a second goes on; at most so many are lost."""
    address = mesh[name]
    machine.succeed(f"ping -i 0.2 {address} > /tmp/ping-{name}.log 2>&1 & echo $! > /tmp/ping.pid")
    try:
        yield
    finally:
        machine.execute("sleep 1; kill -INT $(cat /tmp/ping.pid)")
    text = machine.succeed(f"cat /tmp/ping-{name}.log")
    numbers = set(map(int, re.findall(r"icmp_seq=(\d+) ttl", text)))
    # The last ones may have been on their way.
    lost = set(range(1, max(numbers, default=1))) - numbers
    log.info(f"      {machine.name} to {name}: {len(numbers)} pings answered, {len(lost)} lost")
    assert numbers and len(lost) <= limit, f"{machine.name} lost {len(lost)} of {len(numbers)} pings to {name}"


names = 0


def change():
    """A change that all others must see; seconds until alice and bob have seen it."""
    global names
    names += 1
    name = f"carol-{names}"
    began = time.monotonic()
    admin(f"nodes rename {mesh['carol']} {name}")
    for machine in (alice, bob):
        wait_for(lambda: name in peers(machine), f"{machine.name} sees carol's new name", SOON + 5)
    if present("stock"):
        wait_for(lambda: name in peers(stock, "tailscale"), "Tailscale's client sees carol's new name", SOON + 5)
    return time.monotonic() - began


def anew(machine):
    """Makes it a machine that never was in a network."""
    machine.systemctl("stop lacisd.service")
    machine.succeed("rm -rf /var/lib/lacis/*")
    machine.systemctl("start lacisd.service")
    machine.wait_for_unit("lacisd.service", timeout=30)


def guest_joins():
    """Seconds until guest is a node and reaches alice."""
    began = time.monotonic()
    login = f"--login-server={URL} --auth-key=file:/tmp/auth-key --timeout={SOON + 10}s"
    guest.succeed(f"lacis up {login}", timeout=SOON + 15)
    guest.wait_until_succeeds(f"ping -c 1 -W 1 {mesh['alice']}", timeout=SOON + 10)
    return time.monotonic() - began


def forget(*names):
    """Deletes nodes by the first labels of their names."""
    for node in json.loads(admin("nodes list --json")):
        if node["name"].split(".")[0].rstrip("-0123456789") in names:
            admin(f"nodes delete {node['id']}")


def calm():
    """Ends what mallory does, and takes away what it and guest have left."""
    mallory.execute("kill $(cat /tmp/hostile-*.pid) 2> /dev/null || true; rm -f /tmp/hostile-*.pid")
    forget("mallory", "watch", "guest")


@contextlib.contextmanager
def attack(command="", ready=None, begin=None, seconds=60, lost=3):
    """The others must keep their network while mallory attacks and what is inside runs, and lose few pings.

    `command` is one of `lacis-lab hostile`, or `begin()` begins it; `ready(lines)` says when it is at its height.
    """
    anew(guest)
    new_key(guest)
    new_key(mallory, flags="--reusable")
    before = {unit: restarts(unit) for unit in SERVERS}
    for unit, machine in SERVERS.items():
        machine.succeed(f"echo 5 > /proc/{process(unit)}/clear_refs")
    try:
        with pinging(alice, "bob", lost), pinging(carol, "alice", lost):
            if begin:
                begin()
            if command:
                hostile(command, seconds)
            if ready:
                wait_for(lambda: ready(said(command)), f"the attack {command} is at its height", seconds)
            changed, joined = change(), guest_joins()
            log.info(f"      a machine joined in {joined:.2f} s, a change was seen after {changed:.2f} s")
            yield
    finally:
        for unit in SERVERS:
            with contextlib.suppress(Exception):
                log.info("      {}: {:.0f} MiB at most, {:.0f} MiB anonymous now".format(unit, *peak(unit)))
        calm()
    for unit in SERVERS:
        assert restarts(unit) == before[unit], f"{unit} has ended and was started again"
        most, _ = peak(unit)
        assert most <= MEMORY, f"{unit} used {most:.0f} MiB"
    assert joined <= SOON, f"a machine joined only after {joined:.1f} s"
    assert changed <= SOON, f"a change was seen only after {changed:.1f} s"


def restart(machine):
    """Its daemon begins with nothing but what it has saved."""
    machine.systemctl("restart lacisd.service")
    machine.wait_for_unit("lacisd.service", timeout=30)


# Pings that a restart may cost.
RESTART = 25

# ---- the attacker ----


def hostile(command, seconds=60, name=None):
    """Starts `lacis-lab hostile …` on mallory; `calm` ends it, unless it has a name of its own."""
    run = f"lacis-lab hostile {command} --seconds {seconds}"
    run += f" --name {name}" if name else ""
    pid = "/dev/null" if name and name != "watch" else f"/tmp/hostile-{command.split()[0]}.pid"
    mallory.succeed(f"{run} > /tmp/hostile-{name or command.split()[0]}.log 2>&1 & echo $! > {pid}")


def said(command):
    """What it has said so far, by its first word or its name."""
    lines = mallory.succeed(f"cat /tmp/hostile-{command.split()[0]}.log").splitlines()
    wrong = [line for line in lines if not line.startswith("{")]
    assert not wrong, f"lacis-lab hostile {command}: {wrong[-1]}"
    return [json.loads(line) for line in lines]


def last(command, key):
    """The last line that has a member."""
    return next((line for line in reversed(said(command)) if key in line), None)


def is_done(lines):
    return any(line.get("done") for line in lines)


def watched(name):
    """What an honest node that only reads was sent of a peer's whole entries, in order."""
    return [line for line in said("watch") if (line.get("name") or "").split(".")[0] == name]


def wrong_members(hostinfo):
    """What a strict client cannot read in host facts, or what has no bounds."""
    for name, value in hostinfo.items():
        if name not in HOSTINFO or not isinstance(value, HOSTINFO[name]):
            yield f"{name} = {json.dumps(value)[:60]}"
        elif isinstance(value, str) and (len(value) > 255 or any(ord(letter) < 32 for letter in value)):
            yield f"{name} has {len(value)} characters, or control characters"
        elif isinstance(value, list) and len(value) > (1024 if name == "RoutableIPs" else 64):
            yield f"{name} has {len(value)} entries"


# ---- attacks ----


def facts_that_nobody_can_read():
    """A node's host facts are nested, of wrong types, long and many (A1)."""
    new_key(mallory, flags="--reusable")
    hostile("watch", name="watch")
    wait_for(lambda: said("watch"), "an honest node watches")
    with attack("hostinfo", ready=is_done, lost=RESTART):
        wait_for(lambda: watched("mallory"), "the watching node sees mallory")
        log.info(f"      answered with {[line['status'] for line in said('hostinfo') if 'status' in line]}")
        # A restart must not be needed, and must not be harmful.
        restart(bob)
        wait_for(lambda: {"alice", "mallory"} <= peers(bob).keys(), "bob knows its peers after a restart")
        unreadable = [line for line in said("watch") if "unreadable" in line]
        assert not unreadable, f"a map cannot be read: {unreadable[0]}"
        for line in watched("mallory"):
            wrong = list(wrong_members(line["hostinfo"] or {}))
            assert not wrong, f"peers are sent of mallory: {wrong}"


def bodies_that_wait():
    """Registrations with large bodies wait for approval, on all streams of several sessions (A2)."""
    with attack("followups", ready=lambda lines: len(lines) > 5):
        log.info(f"      {said('followups')[-1]}")


def endpoints_without_end():
    """A node has 116,000 endpoints, and then changes its two as fast as it can (A3)."""
    with attack("endpoints", ready=is_done):
        log.info(f"      {said('endpoints')[1:]}")
        hostile("watch", name="watch")
        wait_for(lambda: watched("mallory"), "the watching node sees mallory")
        newest = last("endpoints", "done")["last"]
        seen = lambda: [line for line in said("watch") if line.get("last") == newest]
        wait_for(seen, "others see mallory's newest endpoint", 30)
        most = max(line.get("endpoints", 0) for line in said("watch"))
        assert most <= 64, f"others are sent {most} endpoints of mallory"


def silent_connections():
    """Thousands of connections from one address say nothing, and some a byte a second (A4)."""
    command = "connections mesh.example.org:443 relay.example.org:443"
    steady = lambda lines: len(lines) > 24
    with attack(command, ready=steady):
        for target in command.split()[1:]:
            line = next(line for line in reversed(said(command)) if line["target"] == target)
            log.info(f"      {line}")
            assert line["open"] < 4096, f"one address has {line['open']} connections to {target}"
            assert line["longest_trickle"] < 30_000, f"a trickle keeps a connection to {target}"
            assert line["trickles_ended"], f"trickles keep their connections to {target}"
        guest.succeed("curl -fsS -m 5 -o /dev/null https://relay.example.org/", timeout=10)


def sessions_of_nobody():
    """More than a thousand Noise sessions never become a node's (A4)."""
    finished = lambda lines: any(line["done"] for line in lines)
    with attack("sessions", ready=finished):
        line = said("sessions")[-1]
        log.info(f"      {line}")
        assert line["open"] < 1000, f"one address has {line['open']} sessions without a node"


def registrations_of_nobody():
    """A thousand registrations wait for approval; one that was there before is approved all the same (A4)."""
    anew(erin)
    erin.succeed(f"lacis up --login-server={URL} --timeout=100s > /tmp/up.log 2>&1 &")
    waiting = lambda: re.search(r"lacis-reg-\w+", erin.succeed("cat /tmp/up.log"))
    wait_for(waiting, "erin is sent to a page")
    with attack("registrations", ready=is_done, seconds=90):
        log.info(f"      {last('registrations', 'done')}")
        admin(f"registrations approve {waiting().group()} --user family")
        wait_for(lambda: status(erin)["BackendState"] == "Running", "erin is a node once she is approved", SOON)
    erin.succeed("lacis logout", timeout=20)
    forget("erin")


def a_copied_disco_key():
    """A node announces alice's disco key: alice and bob stay direct (A5)."""
    assert way(bob, "alice"), "bob has no direct path to alice"
    new_key(mallory, flags="--reusable")
    hostile("watch", name="watch")
    wait_for(lambda: said("watch"), "an honest node watches")
    with attack("disco alice", ready=lambda lines: len(lines) > 6, lost=RESTART):
        log.info(f"      answered with {last('disco', 'status')['status']}")
        for machine, name in ((bob, "alice"), (alice, "bob")):
            assert way(machine, name), f"{machine.name} reaches {name} only by relay"
        restart(bob)
        for machine, name in ((bob, "alice"), (alice, "bob")):
            wait_for(lambda: way(machine, name), f"after bob's restart {machine.name} finds a direct path to {name}", 30)
        copied = last("disco", "disco")["disco"]
        having = {line["id"] for line in said("watch") if line.get("disco") == copied}
        assert len(having) == 1, f"several nodes have one disco key: {having}"


def another_key_over_http():
    """Somebody on the path to a server without TLS stands in for it (A6)."""
    anew(erin)
    plain.wait_for_unit("lacis-coordinator.service", timeout=30)
    admin("users create family", plain)
    enter(plain, PLAIN, erin)
    known = erin.succeed("lacis ip -4")

    def begin():
        plain.systemctl("stop lacis-coordinator.service")
        config = {
            "server_url": PLAIN,
            "listen": ["0.0.0.0:80"],
            "state_dir": "/tmp/impostor",
            "admin_socket": "/tmp/impostor.sock",
            "embedded_relay": False,
            "relays": {"rly": {"id": 901, "name": "Relay", "nodes": [{"host_name": "relay.plain.example.org"}]}},
            "metrics_listen": "off",
            "tailnets": {"lab": {"domain": "erin.example.org"}},
        }
        put(plain, "/tmp/impostor.yaml", json.dumps(config))
        run = "lacis-coordinator serve --config /tmp/impostor.yaml"
        plain.succeed(f"{run} > /tmp/impostor.log 2>&1 & echo $! > /tmp/impostor.pid")
        plain.wait_for_open_port(80, timeout=10)

    with attack(begin=begin):
        try:
            says = lambda: "--force-reauth" in erin.execute("lacis status; lacis status --json")[1]
            wait_for(says, "erin's status says --force-reauth", 30)
        finally:
            state = status(erin)["BackendState"]
            plain.succeed("kill $(cat /tmp/impostor.pid)")
            plain.wait_until_fails("exec 3<>/dev/tcp/localhost/80", timeout=20)
            plain.systemctl("start lacis-coordinator.service")
        assert state == "Running", f"erin is in state {state}"
        assert erin.succeed("lacis ip -4") == known
    admin("nodes rename erin irene", plain)
    renamed = lambda: status(erin)["Self"]["DNSName"].startswith("irene.")
    wait_for(renamed, "erin is back at the genuine server", 60)


def relays_of(name):
    """By region, whether a node that stays is connected."""
    return {line["relay"]: line["connected"] for line in said(name) if "relay" in line}


ended_at = {}


def ended_nodes():
    """An expired and a deleted node go on asking for maps, and stay at their relays (A9)."""
    for verb in ("expire", "delete"):
        name = f"{verb}d"
        new_key(mallory, flags="--reusable")
        hostile("stay", 600, name)
        there = lambda: sum(relays_of(name).values()) == 2 and last(name, "map")
        wait_for(there, f"{name} is at both relays", 20)
        assert last(name, "map")["peers"] >= 3, f"{name} sees its peers while it may"
        ended_at[name] = time.monotonic()
        admin(f"nodes {verb} {name}")
        wait_for(lambda: not last(name, "map")["peers"], f"{name} is sent no peers", SOON)
        wait_for(lambda: not relays_of(name)[900], f"the embedded relay lets go of {name}", SOON)
        log.info(f"      {name}: no map and no embedded relay after {time.monotonic() - ended_at[name]:.1f} s")


def relays_ask_again():
    """The relay that is not the coordinator's own lets go of them too, and they stay out (A9)."""
    assert ended_at.keys() == {"expired", "deleted"}, "there are no such nodes"
    for name, when in ended_at.items():
        left = ASKED_AGAIN - (time.monotonic() - when)
        wait_for(lambda: not relays_of(name)[901], f"the relay lets go of {name}", max(left, 1))
        mallory.succeed("sleep 2")
        assert not any(relays_of(name).values()), f"{name} is at a relay again: {relays_of(name)}"
        assert not last(name, "map")["peers"], f"{name} is sent peers again"


# ---- all of them ----


start_all()

with subtest("an honest network: alice and bob direct, carol by relay"):
    relay.wait_for_unit("lacis-relay.service", timeout=30)
    join(hub, URL, alice, bob, carol)
    if present("stock"):
        enter(hub, URL, stock, command="tailscale")
    mesh = {machine.name: machine.succeed("lacis ip -4").strip() for machine in (alice, bob, carol)}
    alice.succeed("lacis ping bob", timeout=30)
    carol.wait_until_succeeds("ping -c 1 -W 1 alice", timeout=15)
    wait_for(lambda: way(alice, "bob") and way(bob, "alice"), "alice and bob are direct", 30)
    for unit, machine in SERVERS.items():
        put(machine, "/tmp/guard.py", GUARD)
        machine.succeed(f"python3 /tmp/guard.py {unit} {3 * MEMORY} > /tmp/guard.log 2>&1 &")

failed = []
for act in (
    ended_nodes,
    facts_that_nobody_can_read,
    bodies_that_wait,
    endpoints_without_end,
    silent_connections,
    sessions_of_nobody,
    registrations_of_nobody,
    a_copied_disco_key,
    another_key_over_http,
    relays_ask_again,
):
    try:
        with subtest(act.__doc__):
            act()
    except Exception as error:
        log.info(f"      {error}")
        failed.append(act.__name__)
    finally:
        calm()
        # The next one begins with a network that is whole.
        for machine, name in ((alice, "bob"), (bob, "alice"), (carol, "alice")):
            machine.wait_until_succeeds(f"ping -c 1 -W 1 {mesh[name]}", timeout=60)

assert not failed, f"these attacks did harm: {', '.join(failed)}"
