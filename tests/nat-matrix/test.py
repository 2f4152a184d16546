"""Measures every pair of sides of the topology's table `expect`: direct or relayed, how soon, and how fast before and after.

Each measurement is a first contact of two idle peers: the hosts of side x are x-a and x-b, and x meets y as x-a with y-b.
`lacis-lab matrix` says by LACIS_LAB_MATRIX which clients there are and how many pairs to measure at once, and wants the
figures in a file; without it the script itself fails if anything is not as expected.
"""

import json
import os
import re
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

URL = "https://mesh.example.org"
WISHES = json.loads(os.environ.get("LACIS_LAB_MATRIX", "{}"))
CLIENTS = WISHES.get("clients", "lacisd")
AT_ONCE = WISHES.get("parallel", 3)
# Of many runs the share counts; in a single one a pair that is direct often, not always, may be tried once more.
ALONE = WISHES.get("runs", 1) == 1
# Command and local API of each client.
LACIS = ("lacis", "/run/lacis/lacisd.sock")
TAILSCALE = ("tailscale", "/run/tailscale/tailscaled.sock")
OURS = {"lacisd": "ab", "mixed": "a", "tailscaled": ""}[CLIENTS]
OUTCOMES = {"d": "direct", "o": "direct", "r": "relay", "?": "either"}
# Seconds: until a path has to be direct, and for how long one is watched that has to stay relayed.
PATIENCE = {"direct": 20, "either": 20, "relay": 6}
# Nobody waits for a first answer, whatever the path becomes.
FIRST_ANSWER = 0.3

# Runs on both hosts: watches the local API for the moment when the path to the peer is direct, and on one of them sends
# an echo request each 50 ms. Times are the machines' clocks; JSON on standard output.
PROBE = """
import http.client, json, os, select, socket, struct, sys, time

role, local, peer = sys.argv[1:4]
begin, patience = float(sys.argv[4]), float(sys.argv[5])


class Local(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(local)


def path():
    asking = Local("local-tailscaled.sock")
    asking.request("GET", "/localapi/v0/status")
    known = json.loads(asking.getresponse().read())["Peer"] or {}
    asking.close()
    return next((one.get("CurAddr") for one in known.values() if peer in (one.get("TailscaleIPs") or [])), None)


def summed(data):
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xffff)
    return ~(total + (total >> 16)) & 0xffff


def request(number):
    body = struct.pack("!HH", own, number) + bytes(48)
    return struct.pack("!BBH", 8, 0, summed(struct.pack("!BBH", 8, 0, 0) + body)) + body


own = os.getpid() & 0xffff
echo = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
# The kernel says when a packet came: this program may be busy. 35 is SO_TIMESTAMPNS.
echo.setsockopt(socket.SOL_SOCKET, 35, 1)
echo.setblocking(False)
sent, answered, direct = [], {}, None
next_request = next_look = begin
# How late this program itself was, on a machine that has too much to do.
late = 0
end = begin + patience
while (now := time.time()) < end:
    if role == "ping" and now >= next_request:
        late = max(late, now - next_request)
        try:
            echo.sendto(request(len(sent)), (peer, 0))
        except OSError:
            pass
        sent.append(now)
        next_request += 0.05
    if direct is None and now >= next_look:
        found = path()
        now = time.time()
        next_look = now + (0.03 if now < begin + 1.5 else 0.1)
        if found:
            direct = now
            end = min(end, now + (0.7 if role == "ping" else 0))
    next_event = min(end, next_request if role == "ping" else end, next_look if direct is None else end)
    select.select([echo], [], [], max(0, next_event - time.time()))
    while True:
        try:
            packet, extra, _, source = echo.recvmsg(2048, 256)
        except BlockingIOError:
            break
        at = 4 * (packet[0] & 15)
        kind, _, _, who, number = struct.unpack("!BBHHH", packet[at:at + 8])
        if (kind, who, source[0]) == (0, own, peer) and number not in answered:
            seconds, nanoseconds = struct.unpack("qq", extra[0][2][:16])
            answered[number] = seconds + nanoseconds / 1e9
print(json.dumps({
    "sent": sent,
    "answers": [[answered[number], answered[number] - sent[number]] for number in sorted(answered)],
    "direct": direct,
    "late": late,
}))
"""

HOSTS = {machine.name: machine for machine in machines}
NAMES = [f"{side}-{end}" for side in expect["sides"] for end in "ab"]
addresses = {}


def client(name):
    """Command and local API of the client on a host."""
    return LACIS if name[-1] in OURS else TAILSCALE


def unit(name):
    """The service of the client on a host."""
    return f"{client(name)[0]}d.service"


def join(name, key):
    """Brings a host into the network."""
    machine, (command, _) = HOSTS[name], client(name)
    machine.wait_for_unit(unit(name), timeout=60)
    machine.succeed(f"umask 077; printf %s {key} > /tmp/auth-key")
    machine.succeed(f"{command} up --login-server={URL} --auth-key=file:/tmp/auth-key --timeout=60s", timeout=70)
    addresses[name] = machine.succeed(f"{command} ip -4", timeout=10).strip()
    machine.succeed(f"cat > /tmp/probe.py <<'END'\n{PROBE}\nEND")


def knows_all(name):
    """Whether a host knows all others and where they are at home."""
    found = peers(HOSTS[name], client(name)[0])
    return len(found) == len(NAMES) - 1 and all(peer["Relay"] for peer in found.values())


def path(name, other, direct):
    """What the client's own ping says of the path."""
    command = client(name)[0]
    how = "-c 3" if direct else "-c 1 --until-direct=false"
    said = HOSTS[name].execute(f"{command} ping {how} {addresses[other]}", timeout=30)[1]
    found = re.findall(r"via (\S+) in", said)
    return found[-1] if found else "nothing"


def probes(name, other):
    """How many probe packets a search has cost, if the client says so."""
    if client(name) != LACIS:
        return None
    status, said = HOSTS[name].execute(f"lacis ping --why --json {addresses[other]}", timeout=10)
    try:
        return json.loads(said)["Probes"] if status == 0 else None
    except json.JSONDecodeError:
        return None


def median(values):
    return statistics.median(values) if values else None


def round_trip(name, other):
    """Seconds of an echo request, for a pair whose other side was direct so late that none was timed after it."""
    said = HOSTS[name].execute(f"ping -c 5 -i 0.1 -W 2 {addresses[other]}", timeout=20)[1]
    return median([float(took) / 1000 for took in re.findall(r"time=([\d.]+) ms", said)])


def measure(first, second, expected):
    """One pair, from the first packet on."""
    names = (f"{first}-a", f"{second}-b")
    begin = time.time() + 0.5

    def probe(role, name, other):
        command = f"python3 /tmp/probe.py {role} {client(name)[1]} {addresses[other]} {begin} {PATIENCE[expected]}"
        return json.loads(HOSTS[name].succeed(command, timeout=PATIENCE[expected] + 30))

    with ThreadPoolExecutor(2) as both:
        watched = both.submit(probe, "watch", names[1], names[0])
        pinged = probe("ping", *names)
        watched = watched.result()
    started = pinged["sent"][0]
    direct = pinged["direct"] is not None and watched["direct"] is not None
    shown = path(*names, direct)
    after = max(pinged["direct"], watched["direct"]) if direct else float("inf")
    told = [probes(*names), probes(*reversed(names))]
    ping_after = median([took for came, took in pinged["answers"] if came >= after])
    return {
        "pair": [first, second],
        "expected": expected,
        "got": "direct" if direct and re.match(r"[\[\d]", shown) else "relay",
        "path": shown,
        "first_answer": pinged["answers"][0][0] - started if pinged["answers"] else None,
        "late": pinged["late"],
        "direct_after": max(after - started, 0) if direct else None,
        "direct_each": [one["direct"] and one["direct"] - started for one in (pinged, watched)],
        "ping_before": median([took for came, took in pinged["answers"] if came < after]),
        "ping_after": round_trip(*names) if direct and ping_after is None else ping_after,
        "probes": sum(number for number in told if number is not None) if any(told) else None,
    }


def judge(result):
    """What is not as it should be."""
    wrong = []
    if result["expected"] not in (result["got"], "either"):
        wrong.append(f"{result['got']}, not {result['expected']} (via {result['path']})")
    if result["first_answer"] is None:
        wrong.append("no answer")
    elif CLIENTS == "lacisd" and result["first_answer"] > FIRST_ANSWER + result["late"]:
        wrong.append(f"first answer after {result['first_answer']:.2f} s")
    return wrong


def refresh(first, second):
    """Both hosts as after a power cut, and their routers without memory."""
    names = (f"{first}-a", f"{second}-b")
    for name in names:
        HOSTS[name].crash()
        globals()[f"at-{name}".replace("-", "_")].succeed("conntrack -F")
    for name in names:
        HOSTS[name].start()
        HOSTS[name].wait_for_unit(unit(name), timeout=60)
        HOSTS[name].succeed(f"cat > /tmp/probe.py <<'END'\n{PROBE}\nEND")
        wait_for(lambda: knows_all(name), f"{name} knows all others", timeout=60)


def attempt(first, second, outcome):
    """One pair, measured and judged; once more if chance may be to blame, and that is said."""
    for tries in (1, 2):
        result = measure(first, second, OUTCOMES[outcome])
        result["wrong"] = judge(result)
        result["tries"] = tries
        show(result)
        if not (result["wrong"] and outcome == "o" and ALONE) or tries == 2:
            return result
        log.info(f"{first} - {second}: once more on fresh hosts")
        refresh(first, second)


def show(result):
    """One line for a reader."""
    seconds = "-" if result["direct_after"] is None else f"{result['direct_after']:.2f} s"
    line = f"{' - '.join(result['pair']):24} {result['expected']:7} {result['got']:7} {seconds:>8}"
    log.info(f"{line}  {'; '.join(result['wrong'])}".rstrip())


class Tournament:
    """All pairs, each once, at most AT_ONCE together, no host in two of them."""

    def __init__(self, pairs):
        self.waiting = list(pairs)
        self.busy = set()
        self.results = []
        self.failure = None
        self.changed = threading.Condition()

    def take(self):
        """The next pair whose hosts are both free; nothing when all have been taken."""
        with self.changed:
            while self.waiting and not self.failure:
                for pair in self.waiting:
                    hosts = {f"{pair[0]}-a", f"{pair[1]}-b"}
                    if not hosts & self.busy:
                        self.waiting.remove(pair)
                        self.busy |= hosts
                        return pair
                self.changed.wait()
            return None

    def work(self):
        """Measures pair after pair."""
        while pair := self.take():
            try:
                result = attempt(*pair)
                with self.changed:
                    self.results.append(result)
            except Exception as error:
                self.failure = error
            with self.changed:
                self.busy -= {f"{pair[0]}-a", f"{pair[1]}-b"}
                self.changed.notify_all()

    def run(self):
        """What came of all pairs."""
        workers = [threading.Thread(target=self.work) for _ in range(AT_ONCE)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if self.failure:
            raise self.failure
        return self.results


start_all()

with subtest("coordinator and relay are up"):
    hub.wait_for_unit("lacis-coordinator.service", timeout=60)
    relay.wait_for_unit("lacis-relay.service", timeout=60)
    hub.wait_until_succeeds(f"curl -fsS {URL}/health", timeout=20)

with subtest(f"{len(NAMES)} hosts join"):
    hub.succeed("lacis admin users create matrix")
    key = json.loads(hub.succeed("lacis admin keys create --user matrix --reusable --json"))["key"]
    with ThreadPoolExecutor(4) as joining:
        list(joining.map(lambda name: join(name, key), NAMES))

with subtest("each knows all others"):
    for name in NAMES:
        wait_for(lambda: knows_all(name), f"{name} knows all others", timeout=60)

PAIRS = []
for row, second in enumerate(expect["sides"]):
    for first, outcome in zip(expect["sides"], expect[CLIENTS][second].split()):
        PAIRS.append((first, second, outcome))

with subtest(f"{len(PAIRS)} pairs"):
    results = Tournament(PAIRS).run()

if WISHES:
    keep("matrix.json", json.dumps(results))
else:
    wrong = [f"{' - '.join(result['pair'])}: {'; '.join(result['wrong'])}" for result in results if result["wrong"]]
    assert not wrong, "not as expected:\n" + "\n".join(wrong)
