"""Alice's office lets nothing out but what its HTTP proxy carries, and that wants a user name and a password."""

import base64

URL = "https://mesh.example.org"
PASSWORD = "s@cret-word"
TOKEN = base64.b64encode(f"alice:{PASSWORD}".encode()).decode()

# An HTTP proxy that knows CONNECT to port 443 only; prints each request's first line and what it answered.
PROXY = f"""
import socket, threading

def carry(source, target):
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass
    for side in (source, target):
        try:
            side.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

def serve(near):
    head = b""
    while not head.endswith(b"\\r\\n\\r\\n"):
        piece = near.recv(1)
        if not piece:
            return
        head += piece
    first, *headers = head.decode().split("\\r\\n")
    method, target, _ = first.split(" ")
    if "Proxy-Authorization: Basic {TOKEN}" not in headers:
        answer = "407 Proxy Authentication Required"
    elif method != "CONNECT" or not target.endswith(":443"):
        answer = "403 Forbidden"
    else:
        answer = "200 Connection established"
    print(first, "->", answer, flush=True)
    near.sendall(f"HTTP/1.1 {{answer}}\\r\\nVia: 1.1 office\\r\\n\\r\\n".encode())
    if not answer.startswith("200"):
        near.close()
        return
    far = socket.create_connection(target.rsplit(":", 1), 10)
    threading.Thread(target=carry, args=(far, near), daemon=True).start()
    carry(near, far)

server = socket.create_server(("", 3128))
while True:
    near, _ = server.accept()
    threading.Thread(target=serve, args=(near,), daemon=True).start()
"""


def health():
    return " ".join(status(alice)["Health"] or [])


def restart_with(text):
    put(alice, "/etc/default/lacisd", text)
    alice.systemctl("restart lacisd.service")
    alice.wait_for_unit("lacisd.service", timeout=30)


start_all()

with subtest("nothing leaves the office but by the proxy"):
    put(proxy, "/tmp/proxy.py", PROXY)
    proxy.succeed("python3 /tmp/proxy.py > /tmp/proxy.log 2>&1 &")
    proxy.wait_for_open_port(3128, timeout=10)
    office.succeed(
        "nft add table inet only",
        "nft add chain inet only through '{ type filter hook forward priority -20; }'",
        f"nft add rule inet only through ip daddr {address(proxy)} tcp dport 3128 accept",
        f"nft add rule inet only through ip saddr {address(proxy)} tcp sport 3128 accept",
        "nft add rule inet only through drop",
    )
    alice.fail(f"curl -sS -m 2 {URL}/key?v=100")

with subtest("alice joins, and talks with bob both ways"):
    join(hub, URL, alice, bob)
    alice.wait_until_succeeds("ping -c 1 -W 1 bob", timeout=20)
    bob.succeed("ping -c 1 -W 2 alice")
    assert not (status(alice)["Health"] or []), health()
    asked = proxy.succeed("cat /tmp/proxy.log")
    assert "CONNECT mesh.example.org:443 HTTP/1.1 -> 200" in asked, asked

with subtest("netcheck says so, and nothing says the password"):
    said = alice.succeed("lacis netcheck", timeout=20)
    assert "* Proxy: http://proxy.example.org:3128" in said, said
    assert "CaptivePortal: true" not in said, said
    everything = said + alice.succeed("journalctl -u lacisd; lacis status --json; tr '\\0' ' ' < /proc/$(pgrep -x lacisd)/cmdline")
    for secret in (PASSWORD, "s%40cret-word", TOKEN):
        assert secret not in everything, everything

with subtest("a wrong password is said to be the cause, and a right one heals it"):
    restart_with("HTTPS_PROXY=http://alice:other@proxy.example.org:3128\n")
    wait_for(lambda: "407" in health() and "user name and password" in health(), "health names the proxy", timeout=20)
    restart_with(f"https_proxy='http://alice:s%40cret-word@{address(proxy)}:3128/'\nNO_PROXY=.other.example\n")
    wait_for(lambda: not health(), "health is empty", timeout=20)
    alice.wait_until_succeeds("ping -c 1 -W 1 bob", timeout=20)

with subtest("what is excepted goes the direct way, which is none here"):
    restart_with("HTTPS_PROXY=http://alice:s%40cret-word@proxy.example.org:3128\nNO_PROXY=example.org\n")
    wait_for(lambda: "mesh.example.org" in health(), "health names the coordinator", timeout=20)

with subtest("a proxy of a kind that is not known ends the daemon with a reason"):
    put(alice, "/etc/default/lacisd", "ALL_PROXY=socks5://alice:s%40cret-word@proxy.example.org:1080\n")
    alice.systemctl("restart lacisd.service")
    alice.wait_until_succeeds("journalctl -u lacisd | grep 'ALL_PROXY is not usable: SOCKS'", timeout=10)
    alice.fail("journalctl -u lacisd | grep cret-word")
