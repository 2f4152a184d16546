"""What several scripts use: read before each scenario's own, by the lab and by the virtual machines alike."""

import json
import time

# Tells whoever asks at port 8000, by HTTP and by UDP, which address it sees, and prints that too.
MIRROR = """
import socket, threading, time

def seen(how, sender):
    address = sender[0].removeprefix("::ffff:")
    print(time.time(), how, address, flush=True)
    return address.encode()

def datagrams(asked):
    while True:
        sender = asked.recvfrom(2000)[1]
        asked.sendto(seen("udp", sender), sender)

asked = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
asked.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
asked.bind(("::", 8000))
threading.Thread(target=datagrams, args=(asked,)).start()
server = socket.create_server(("::", 8000), family=socket.AF_INET6, dualstack_ipv6=True)
while True:
    connection, sender = server.accept()
    with connection:
        connection.settimeout(5)
        try:
            connection.recv(2000)
            connection.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\n" + seen("tcp", sender))
        except OSError:
            pass
"""
# Asks it by UDP, again and again for so many seconds.
ASK = """
import socket, sys, time
asking = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
asking.settimeout(0.5)
end = time.monotonic() + float(sys.argv[2])
while True:
    try:
        asking.sendto(b"?", (sys.argv[1], 8000))
        print(asking.recv(100).decode())
        break
    except TimeoutError:
        if time.monotonic() > end:
            sys.exit("no answer")
"""


def status(machine, command="lacis"):
    """What a client says of itself and its peers."""
    return json.loads(machine.succeed(f"{command} status --json", timeout=10))


def peers(machine, command="lacis"):
    """The peers that a client knows, by the first label of their names."""
    found = status(machine, command).get("Peer") or {}
    return {peer["DNSName"].split(".")[0]: peer for peer in found.values()}


def wait_for(fact, what, timeout=15):
    """Waits until `fact` gives something true, and says what was missing otherwise."""
    try:
        retry(lambda _last: bool(fact()), timeout_seconds=timeout)
    except Exception as error:
        raise AssertionError(f"{what}: {error}") from error


def within(limit, act, fact, what):
    """Does something and says how many seconds later `fact` is true; fails if it takes longer than `limit`."""
    began = time.monotonic()
    act()
    while not fact():
        assert time.monotonic() - began < limit + 10, f"{what}: not in {limit + 10} s"
        time.sleep(0.05)
    took = time.monotonic() - began
    log.info(f"      {what}: after {took:.2f} s")
    assert took <= limit, f"{what}: after {took:.2f} s, not {limit} s"
    return took


def present(name):
    """Whether an optional host is here."""
    return any(machine.name == name for machine in machines)


def enter(hub, url, machine, command="lacis", key="--user family", flags=""):
    """Makes a machine a node, by a key of these properties. `command` is its client's."""
    made = json.loads(hub.succeed(f"lacis admin keys create {key} --json"))["key"]
    machine.succeed(f"umask 077; printf %s {made} > /tmp/auth-key")
    machine.wait_for_unit(f"{command}d.service", timeout=30)
    login = f"--login-server={url} --auth-key=file:/tmp/auth-key --timeout=20s"
    machine.succeed(f"{command} up {login} {flags}", timeout=30)


def join(hub, url, *clients):
    """Makes a user of the coordinator on `hub`, and these clients nodes of it that know each other."""
    hub.wait_for_unit("lacis-coordinator.service", timeout=30)
    hub.succeed("lacis admin users create family")
    for machine in clients:
        enter(hub, url, machine)
    names = {machine.name for machine in clients}
    for machine in clients:
        wait_for(lambda: peers(machine).keys() == names - {machine.name}, f"{machine.name} knows the others")


def reboot(machine):
    """Shuts a machine down and boots it. (Its own `reboot()` works only for machines that were started for it.)"""
    machine.shutdown()
    machine.start()


def keep(name, text):
    """Leaves a file among the run's results."""
    (driver.out_dir / name).write_text(text)


def address(machine, device="eth0", family=4):
    """Its IPv4 (or IPv6) address on a device."""
    said = machine.succeed(f"ip -{family} -brief address show dev {device} scope global")
    return said.split()[2].split("/")[0]


def routes(machine):
    """The prefixes that a client sends into the mesh: those of table 52."""
    # ip ends with an error where a family has no such table yet, which is an empty one.
    said = machine.succeed("for family in 4 6; do ip -$family route show table 52 2> /dev/null || true; done")
    return {line.split()[0] for line in said.splitlines()}


def put(machine, path, text):
    """Writes a file."""
    machine.succeed(f"cat > {path} <<'END'\n{text}\nEND")


def mirror(machine):
    """Starts what tells whoever asks at port 8000 which address it sees."""
    put(machine, "/tmp/mirror.py", MIRROR)
    machine.succeed("python3 /tmp/mirror.py > /tmp/mirror.log 2>&1 &")
    machine.wait_for_open_port(8000, timeout=10)


def url_of(host, port=8000):
    """Of a name or an address."""
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def seen_by(host, machine, limit=5):
    """The address that a mirror sees a machine at, by TCP and UDP; the same for both."""
    by_tcp = machine.succeed(f"curl -fsS -m {limit} {url_of(host)}").strip()
    put(machine, "/tmp/ask.py", ASK)
    by_udp = machine.succeed(f"python3 /tmp/ask.py {host} {limit}").strip()
    assert by_tcp == by_udp, f"{host} sees {machine.name} at {by_tcp} by TCP and at {by_udp} by UDP"
    return by_tcp


def reaches(machine, host, port=8000, limit=1):
    """Whether a machine gets a page, within seconds."""
    return machine.execute(f"curl -fsS -o /dev/null -m {limit} {url_of(host, port)}")[0] == 0


def set_policy(hub, policy, options=""):
    """Gives the coordinator a policy, here a dictionary."""
    put(hub, "/tmp/policy.json", json.dumps(policy, indent=1))
    hub.succeed(f"lacis admin policy set {options} /tmp/policy.json", timeout=10)


def way(machine, name):
    """Where a client sends packets for a peer; nothing when that is not one address alone: by relay, or in doubt."""
    return peers(machine)[name]["CurAddr"]


def clock(machine):
    """Seconds by the machine's own clock."""
    return float(machine.succeed("date +%s.%N"))


def copy(source, target, address, port=7000):
    """Sends two megabytes by TCP and compares checksums."""
    receive = f"import socket; s = socket.create_server(('::', {port}), family=socket.AF_INET6, dualstack_ipv6=True); "
    receive += "c = s.accept()[0]; "
    receive += "open('/tmp/copy', 'wb').writelines(iter(lambda: c.recv(65536), b''))"
    target.succeed(f'python3 -c "{receive}" > /tmp/receive.log 2>&1 &')
    target.wait_until_succeeds(f"ss -ltn | grep -w {port}", timeout=10)
    source.succeed("head -c 2M /dev/urandom > /tmp/original")
    send = f"import socket; s = socket.create_connection(('{address}', {port}), 10); "
    send += "s.sendfile(open('/tmp/original', 'rb')); s.shutdown(1); s.recv(1)"
    source.succeed(f'python3 -c "{send}"', timeout=40)
    assert source.succeed("sha256sum < /tmp/original") == target.succeed("sha256sum < /tmp/copy"), "the copy differs"
