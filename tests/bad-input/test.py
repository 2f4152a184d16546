"""Each mistake ends in one line that names it and the way out; the daemon outlives them all."""

import json

URL = "https://mesh.example.org"
COORDINATOR = """
server_url: https://mesh.example.org
listen: ["127.0.0.1:8443"]
state_dir: {state}
metrics_listen: "off"
embedded_relay: {{ stun_listen: [] }}
tailnets: {{ lab: {{ domain: lab.example.org }} }}
"""
# Says anything but what a coordinator says.
GARBAGE = """
import socket, sys
server = socket.create_server(("", int(sys.argv[1])))
while True:
    connection, _ = server.accept()
    connection.settimeout(2)
    try:
        connection.recv(4096)
        connection.sendall(sys.argv[2].encode().decode("unicode_escape").encode("latin-1"))
    except OSError:
        pass
    connection.close()
"""


def refused(machine, command, *words, timeout=25):
    """Runs a command that must fail, with one line that has all the words in it."""
    said = machine.fail(f"{command} 2>&1", timeout=timeout).strip()
    assert "panicked" not in said, said
    lines = [line for line in said.splitlines() if not line.startswith("Still waiting")]
    assert len(lines) == 1, f"more than one line:\n{said}"
    for word in words:
        assert word.lower() in lines[0].lower(), f"no {word!r} in: {lines[0]}"
    log.info(f"      {lines[0]}")


def up(url, timeout="8s"):
    return f"lacis up --reset --login-server={url} --auth-key=file:/tmp/auth-key --timeout={timeout}"


def write(machine, path, text):
    machine.succeed(f"mkdir -p $(dirname {path}) && cat > {path} <<'END'\n{text}\nEND")


start_all()
hub.wait_for_unit("lacis-coordinator.service", timeout=30)
alice.wait_for_unit("lacisd.service", timeout=30)
hub.succeed("lacis admin users create family")
key = json.loads(hub.succeed("lacis admin keys create --user family --json"))["key"]

with subtest("lacis up: keys and URLs"):
    refused(alice, "lacis up --login-server=https://mesh.example.org --auth-key=file:/nowhere", "/nowhere")
    alice.succeed("umask 077; echo tskey-auth-wrong > /tmp/auth-key")
    refused(alice, up(URL), "key")
    alice.succeed(f"umask 077; printf %s {key} > /tmp/auth-key")
    refused(alice, up("mesh.example.org"), "https://")
    refused(alice, up("ftp://mesh.example.org"), "http")
    refused(alice, up("https://nobody.example.org"), "nobody.example.org")
    refused(alice, up("https://mesh.example.org:444"), ":444", "refused")
    refused(alice, up("http://mesh.example.org:443"), "mesh.example.org")

with subtest("lacis up: servers that are no coordinator"):
    write(hub, "/tmp/garbage.py", GARBAGE)
    for port, answer in (
        (8001, "HTTP/1.1 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\nhello"),
        (8002, "SSH-2.0-OpenSSH_9.2\\r\\n"),
        (8003, "HTTP/1.1 404 Not Found\\r\\nContent-Length: 0\\r\\n\\r\\n"),
        (8004, "\\x00\\xff\\xfe\\x01"),
    ):
        hub.succeed(f"python3 /tmp/garbage.py {port} '{answer}' > /dev/null 2>&1 &")
        alice.wait_until_succeeds(f"exec 3<>/dev/tcp/mesh.example.org/{port}", timeout=10)
        refused(alice, up(f"http://mesh.example.org:{port}"), f"mesh.example.org:{port}")

with subtest("after all that the right URL and key work"):
    alice.succeed(up(URL, "20s"), timeout=30)
    alice.succeed(up(URL, "20s"), timeout=30)
    assert "alice" in hub.succeed("lacis admin nodes list")

with subtest("lacis up: a key that was given in person is not repeated"):
    alice.succeed("lacis set --hostname=alix")
    for key in ("--auth-key=tskey-auth-secret", "--auth-key secret", "--authkey=file:tskey-auth-secret"):
        said = alice.fail(f"lacis up --accept-dns=false {key} 2>&1", timeout=20)
        assert "secret" not in said and ("--hostname=alix" in said or "path" in said), said
    alice.succeed("lacis set --hostname=")

with subtest("lacis: no daemon, no peer, nonsense"):
    refused(bench, "lacis status", "/run/lacis/lacisd.sock", "lacisd")
    refused(alice, "lacis ping nobody", "nobody")
    refused(alice, "lacis whois 100.64.99.99", "no match")
    refused(hub, "lacis admin nodes delete nobody", "nobody")
    refused(hub, "lacis admin keys create --user nobody", "nobody")
    refused(hub, "lacis admin keys create --user family --expiry soon", "24h")
    refused(hub, "lacis admin users create family", "family")

with subtest("lacisd: state, device, rights"):
    lacisd = "lacisd --state-dir {state} --socket /tmp/{socket}.sock --tun {tun} --log error"
    bench.succeed("touch /tmp/file")
    refused(bench, lacisd.format(state="/tmp/file", socket="a", tun="t0"), "/tmp/file")
    bench.succeed("mkdir -m 700 /tmp/damaged && echo '{' > /tmp/damaged/state.json")
    refused(bench, lacisd.format(state="/tmp/damaged", socket="a", tun="t0"), "/tmp/damaged/state.json")
    refused(bench, lacisd.format(state="/tmp/s1", socket="a", tun="a-name-that-is-too-long"), "name")
    bench.succeed("ip link add busy0 type veth peer name busy1")
    refused(bench, lacisd.format(state="/tmp/s2", socket="a", tun="busy0"), "busy0")
    powerless = "setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "
    refused(bench, powerless + lacisd.format(state="/tmp/s3", socket="a", tun="t1"), "root")
    bench.succeed(lacisd.format(state="/tmp/s4", socket="b", tun="t2") + " > /tmp/first.log 2>&1 &")
    bench.wait_until_succeeds("test -S /tmp/b.sock", timeout=10)
    refused(bench, lacisd.format(state="/tmp/s4", socket="c", tun="t3"), "/tmp/s4")
    refused(bench, lacisd.format(state="/tmp/s5", socket="b", tun="t4"), "/tmp/b.sock")

with subtest("lacisd: a device that disappears"):
    alice.succeed("ip link delete lacis0")
    alice.wait_until_succeeds("lacis status | grep -w alice && ip link show lacis0", timeout=30)

with subtest("coordinator: configuration"):
    serve = "lacis-coordinator serve --config /tmp/c.yaml"
    refused(bench, serve, "/tmp/c.yaml")
    good = COORDINATOR.format(state="/tmp/c")
    for wrong, words in (
        (good.replace("domain: lab", "domian: lab"), ("/tmp/c.yaml:7", "/tailnets/lab/domian", "domain")),
        (good.replace('"127.0.0.1:8443"', "8443"), ("/tmp/c.yaml:3", "/listen/0", "address")),
        (good.replace("https://mesh", "mesh"), ("/tmp/c.yaml:2", "/server_url", "https://")),
        (good + "tailnets: [", ("/tmp/c.yaml",)),
        (
            good + "relays: { far: { id: 901, nodes: [{ host_name: derp.lab.example.org }] } }",
            ("/tmp/c.yaml:8", "/relays/far/nodes/0/host_name", "lab.example.org"),
        ),
        (
            good.replace("org }", "org, dns: { extra_records: [{ name: mesh.example.org, address: 192.0.2.9 }] } }"),
            ("/tmp/c.yaml:7", "/tailnets/lab/dns/extra_records/0/name", "the coordinator"),
        ),
    ):
        write(bench, "/tmp/c.yaml", wrong)
        refused(bench, "lacis-coordinator check --config /tmp/c.yaml", *words)
        assert bench.execute(f"{serve} > /dev/null 2>&1")[0] == 78

with subtest("coordinator: ports, state, database"):
    write(bench, "/tmp/c.yaml", good)
    quiet = f"RUST_LOG=off {serve}"
    bench.succeed("python3 -m http.server --bind 127.0.0.1 8443 > /dev/null 2>&1 & echo $! > /tmp/pid")
    bench.wait_until_succeeds("exec 3<>/dev/tcp/127.0.0.1/8443", timeout=10)
    refused(bench, quiet, "127.0.0.1:8443", "listen")
    bench.succeed("kill $(cat /tmp/pid)")
    bench.wait_until_fails("exec 3<>/dev/tcp/127.0.0.1/8443", timeout=10)
    bench.succeed("rm -rf /tmp/c && touch /tmp/c")
    refused(bench, quiet, "/tmp/c")
    bench.succeed("rm /tmp/c && mkdir -m 700 /tmp/c && head -c 8192 /dev/urandom > /tmp/c/coordinator.db")
    refused(bench, quiet, "/tmp/c/coordinator.db", "backup")
    bench.succeed("rm /tmp/c/coordinator.db; echo nonsense > /tmp/c/noise.key")
    refused(bench, quiet, "/tmp/c/noise.key")

with subtest("malformed bytes close that one connection"):
    send = "python3 -c \"import socket, ssl, os; c = ssl.create_default_context().wrap_socket(socket.create_connection(('mesh.example.org', 443)), server_hostname='mesh.example.org'); c.settimeout(15); c.sendall({bytes}); print(len(c.recv(65536)))\""
    upgrade = "b'POST /ts2021 HTTP/1.1\\\\r\\\\nHost: mesh.example.org\\\\r\\\\nUpgrade: tailscale-control-protocol\\\\r\\\\nConnection: upgrade\\\\r\\\\n\\\\r\\\\n' + os.urandom(300)"
    derp = "b'GET /derp HTTP/1.1\\\\r\\\\nHost: mesh.example.org\\\\r\\\\nUpgrade: DERP\\\\r\\\\nConnection: upgrade\\\\r\\\\n\\\\r\\\\n' + os.urandom(300)"
    for what in ("os.urandom(200)", upgrade, derp):
        alice.execute(send.format(bytes=what), timeout=20)
    alice.succeed("lacis status")
    alice.succeed("lacis up", timeout=20)
    assert hub.get_unit_property("lacis-coordinator.service", "NRestarts") == "0"

with subtest("coordinator: a certificate that comes later"):
    hub.succeed("mv /etc/lacis/tls/cert.pem /etc/lacis/tls/later.pem")
    hub.systemctl("kill --signal=SIGKILL lacis-coordinator.service")
    restarts = lambda: int(hub.get_unit_property("lacis-coordinator.service", "NRestarts"))
    wait_for(lambda: restarts() >= 3, "the coordinator is tried again")
    hub.succeed("journalctl -u lacis-coordinator | grep 'cannot read /etc/lacis/tls/cert.pem: No such file'")
    hub.succeed("mv /etc/lacis/tls/later.pem /etc/lacis/tls/cert.pem")
    hub.wait_until_succeeds("lacis admin nodes list", timeout=10)
