"""Alice and bob talk through a relay that restarts, then loses power, while a TCP connection is open."""

URL = "https://mesh.example.org"

# Answers each line with itself, over one connection.
ECHO = """
import socket
server = socket.create_server(("", 7000))
print("listening", flush=True)
connection, _ = server.accept()
while data := connection.recv(65536):
    connection.sendall(data)
"""
# A line each 100 ms, until the file /tmp/enough is there; then says how many were answered and the longest wait.
TALK = """
import os, socket, time
connection = socket.create_connection(("bob", 7000), 10)
connection.settimeout(60)
lines = connection.makefile("rw")
number, longest = 0, 0.0
while not os.path.exists("/tmp/enough"):
    began = time.monotonic()
    lines.write(f"line {number}\\n")
    lines.flush()
    assert lines.readline() == f"line {number}\\n"
    longest = max(longest, time.monotonic() - began)
    number += 1
    time.sleep(0.1)
print(f"{number} lines, the longest wait {longest:.1f} s")
"""

start_all()

with subtest("coordinator and relay are up, both clients join"):
    relay.wait_for_unit("lacis-relay.service", timeout=30)
    join(hub, URL, alice, bob)

with subtest("they talk through the relay"):
    alice.wait_until_succeeds("ping -c 1 -W 1 bob", timeout=15)
    said = alice.succeed("lacis ping --until-direct=false -c 2 bob", timeout=20)
    assert said.count("via DERP(rly)") == 2, said
    bob.succeed(f"cat > /tmp/echo.py <<'END'\n{ECHO}\nEND")
    alice.succeed(f"cat > /tmp/talk.py <<'END'\n{TALK}\nEND")
    bob.succeed("python3 /tmp/echo.py > /tmp/echo.log 2>&1 &")
    bob.wait_until_succeeds("grep listening /tmp/echo.log", timeout=10)
    alice.succeed("python3 /tmp/talk.py > /tmp/talk.log 2>&1 &")

with subtest("the relay restarts"):
    relay.systemctl("restart lacis-relay.service")
    relay.wait_for_unit("lacis-relay.service", timeout=30)
    alice.wait_until_succeeds("ping -c 1 -W 1 bob", timeout=15)
    bob.wait_until_succeeds("ping -c 1 -W 1 alice", timeout=15)

with subtest("the relay's machine loses power and comes back"):
    relay.crash()
    alice.fail("ping -c 1 -W 1 bob")
    relay.start()
    relay.wait_for_unit("lacis-relay.service", timeout=30)
    alice.wait_until_succeeds("ping -c 1 -W 1 bob", timeout=60)
    bob.wait_until_succeeds("ping -c 1 -W 1 alice", timeout=60)

with subtest("the TCP connection lived through both"):
    alice.succeed("touch /tmp/enough")
    alice.wait_until_succeeds("grep lines /tmp/talk.log", timeout=60)
    log.info(alice.succeed("cat /tmp/talk.log").strip())
