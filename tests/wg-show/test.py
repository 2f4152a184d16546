"""What WireGuard's own tool says of the mesh's device."""

import base64

URL = "https://mesh.example.org"
SOCKET = "/run/wireguard/lacis0.sock"

# Sends standard input to the socket and prints what comes back.
TALK = f"""
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.settimeout(5)
s.connect("{SOCKET}")
s.sendall(sys.stdin.buffer.read())
s.shutdown(socket.SHUT_WR)
sys.stdout.write("".join(iter(lambda: s.recv(65536).decode(), "")))
"""


def talk(request):
    return alice.succeed(f"printf '{request}' | python3 /tmp/talk.py", timeout=10)


def dump():
    """Public key to endpoint, allowed IPs, handshake, received, sent, keepalive."""
    rows = [line.split("\t") for line in alice.succeed("wg show lacis0 dump", timeout=10).splitlines()]
    return rows[0], {row[0]: row[2:] for row in rows[1:]}


start_all()

with subtest("all join; alice reaches bob directly and carol by relay"):
    join(hub, URL, alice, bob, carol, dave)
    put(alice, "/tmp/talk.py", TALK)
    for name in ("bob", "carol"):
        alice.succeed(f"ping -c 2 -i 0.2 -W 5 {name}", timeout=20)
    wait_for(lambda: way(alice, "bob"), "a direct way to bob")
    keys = {
        name: base64.b64encode(bytes.fromhex(peer["PublicKey"].removeprefix("nodekey:"))).decode()
        for name, peer in peers(alice).items()
    }

with subtest("wg show lists the interface and its peers"):
    assert "lacis0" in alice.succeed("wg show interfaces").split()
    said = alice.succeed("wg show lacis0")
    for line in ("interface: lacis0", "listening port: 41641", f"endpoint: {way(alice, 'bob')}", "latest handshake: "):
        assert line in said, said
    own, shown = dump()
    assert own[0] == "(none)", "the private key is not shown"
    assert own[2:] == ["41641", "0x80000"], own
    assert shown.keys() == set(keys.values()), shown

with subtest("endpoint, handshake and bytes of each peer"):
    endpoint, allowed, handshake, received, sent, keepalive = shown[keys["bob"]]
    assert endpoint == way(alice, "bob")
    assert set(allowed.split(",")) == set(peers(alice)["bob"]["AllowedIPs"])
    assert abs(int(handshake) - time.time()) < 60 and int(received) > 0 and int(sent) > 0 and keepalive == "off"
    assert shown[keys["carol"]][0] == "(none)", "by relay there is no endpoint"
    assert int(shown[keys["carol"]][2]) > 0
    assert shown[keys["dave"]][0] == "(none)" and shown[keys["dave"]][2:5] == ["0", "0", "0"]

with subtest("nothing can be set, and nobody but root asks"):
    assert "Unable to modify interface" in alice.fail("wg set lacis0 listen-port 1 2>&1")
    assert talk("set=1\\nlisten_port=1\\n\\n") == "errno=1\n\n"
    answers = talk("get=1\\n\\nget=1\\n\\n")
    assert answers.count("errno=0\n\n") == 2 and "private_key" not in answers
    assert talk("what=1\\n\\n") == "errno=22\n\n"
    stranger = 'setpriv --reuid 12345 --clear-groups python3 -c "$(cat /tmp/talk.py)" < /dev/null 2>&1'
    assert "PermissionError" in alice.fail(stranger)
    assert dump()[0][2:] == ["41641", "0x80000"]

with subtest("the socket goes with the daemon; one that was left is replaced"):
    alice.systemctl("stop lacisd.service")
    assert alice.execute(f"test -e {SOCKET}")[0] != 0
    alice.succeed("mkdir -p /run/wireguard")
    alice.succeed(f"python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('{SOCKET}')\"")
    alice.systemctl("start lacisd.service")
    alice.wait_for_unit("lacisd.service", timeout=30)
    wait_for(lambda: keys["bob"] in dump()[1], "wg shows bob again")
    alice.succeed("lacis down")
    assert dump()[1] == {}
