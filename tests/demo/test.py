"""Alice, bob and carol join with pre-auth keys, find each other by name, and talk through the relay."""

import json

URL = "https://mesh.example.org"
DOMAIN = "lab.example.org"
MEGABYTES = 20
CLIENTS = {"alice": alice, "bob": bob, "carol": carol}

# One TCP connection on port 7000 carries a file.
RECEIVER = """
import socket, sys
server = socket.create_server(("", 7000))
print("listening", flush=True)
connection, _ = server.accept()
with open(sys.argv[1], "wb") as out:
    while data := connection.recv(65536):
        out.write(data)
connection.sendall(b"done")
"""
SENDER = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 7000), 10)
began = time.monotonic()
with open(sys.argv[2], "rb") as file:
    size = connection.sendfile(file)
connection.shutdown(socket.SHUT_WR)
assert connection.recv(4) == b"done"
print(f"{size * 8 / (time.monotonic() - began) / 1e6:.0f} Mb/s")
"""


def show(machine, command, **how):
    """Runs a command where a reader sees it and what it says."""
    log.info(f"\n{machine.name}$ {command}\n{machine.succeed(command, **how).rstrip()}")


start_all()

with subtest("the coordinator is up"):
    hub.wait_for_unit("lacis-coordinator.service", timeout=30)
    hub.wait_until_succeeds(f"curl -fsS {URL}/health", timeout=10)

with subtest("a user, and a key for each machine"):
    hub.succeed("lacis admin users create family")
    for machine in CLIENTS.values():
        key = json.loads(hub.succeed("lacis admin keys create --user family --json"))["key"]
        machine.succeed(f"umask 077; printf %s {key} > /tmp/auth-key")

with subtest("all three join"):
    for name, machine in CLIENTS.items():
        machine.wait_for_unit("lacisd.service", timeout=30)
        machine.succeed(f"lacis up --login-server={URL} --auth-key=file:/tmp/auth-key --timeout=20s", timeout=30)

with subtest("each sees the others"):
    for name, machine in CLIENTS.items():
        for other in CLIENTS.keys() - {name}:
            machine.wait_until_succeeds(f"lacis status | grep -w {other}", timeout=10)

with subtest("names resolve at 100.100.100.100"):
    address = bob.succeed("lacis ip -4").strip()
    assert alice.succeed(f"dig +short @100.100.100.100 bob.{DOMAIN}").split() == [address]
    alice.succeed("getent hosts bob")

for machine in CLIENTS.values():
    show(machine, "lacis status")
show(alice, "lacis ping --until-direct=false -c 3 bob", timeout=30)
show(bob, "lacis ping --until-direct=false -c 3 carol", timeout=30)
show(alice, f"dig @100.100.100.100 bob.{DOMAIN}")
show(alice, "ping -c 3 -i 0.2 bob", timeout=15)

with subtest(f"alice sends bob {MEGABYTES} MB through the relay"):
    alice.succeed(f"cat > /tmp/send.py <<'END'\n{SENDER}\nEND")
    bob.succeed(f"cat > /tmp/receive.py <<'END'\n{RECEIVER}\nEND")
    bob.succeed("python3 /tmp/receive.py /tmp/copy > /tmp/receive.log 2>&1 &")
    bob.wait_until_succeeds("grep listening /tmp/receive.log", timeout=10)
    alice.succeed(f"head -c {MEGABYTES}M /dev/urandom > /tmp/original")
    speed = alice.succeed("python3 /tmp/send.py bob /tmp/original", timeout=40).strip()
    assert bob.succeed("sha256sum < /tmp/copy") == alice.succeed("sha256sum < /tmp/original"), "the copy differs"
    log.info(f"\n{MEGABYTES} MB from alice to bob, checksums equal: {speed}")
