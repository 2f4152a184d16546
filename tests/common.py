"""What several scripts use: read before each scenario's own, by the lab and by the virtual machines alike."""

import json


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


def join(hub, url, *clients):
    """Makes a user of the coordinator on `hub`, and these clients nodes of it that know each other."""
    hub.wait_for_unit("lacis-coordinator.service", timeout=30)
    hub.succeed("lacis admin users create family")
    for machine in clients:
        key = json.loads(hub.succeed("lacis admin keys create --user family --json"))["key"]
        machine.succeed(f"umask 077; printf %s {key} > /tmp/auth-key")
        machine.wait_for_unit("lacisd.service", timeout=30)
        machine.succeed(f"lacis up --login-server={url} --auth-key=file:/tmp/auth-key --timeout=20s", timeout=30)
    names = {machine.name for machine in clients}
    for machine in clients:
        wait_for(lambda: peers(machine).keys() == names - {machine.name}, f"{machine.name} knows the others")


def address(machine, device="eth0"):
    """Its IPv4 address on a device."""
    said = machine.succeed(f"ip -4 -brief address show dev {device} scope global")
    return said.split()[2].split("/")[0]


def way(machine, name):
    """Where a client sends packets for a peer; nothing when that is not one address alone: by relay, or in doubt."""
    return peers(machine)[name]["CurAddr"]


def clock(machine):
    """Seconds by the machine's own clock."""
    return float(machine.succeed("date +%s.%N"))


def copy(source, target, address, port=7000):
    """Sends two megabytes by TCP and compares checksums."""
    receive = f"import socket; c = socket.create_server(('', {port})).accept()[0]; "
    receive += "open('/tmp/copy', 'wb').writelines(iter(lambda: c.recv(65536), b''))"
    target.succeed(f'python3 -c "{receive}" > /tmp/receive.log 2>&1 &')
    target.wait_until_succeeds(f"ss -ltn | grep -w {port}", timeout=10)
    source.succeed("head -c 2M /dev/urandom > /tmp/original")
    send = f"import socket; s = socket.create_connection(('{address}', {port}), 10); "
    send += "s.sendfile(open('/tmp/original', 'rb')); s.shutdown(1); s.recv(1)"
    source.succeed(f'python3 -c "{send}"', timeout=40)
    assert source.succeed("sha256sum < /tmp/original") == target.succeed("sha256sum < /tmp/copy"), "the copy differs"
