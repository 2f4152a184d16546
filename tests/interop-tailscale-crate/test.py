"""Two nodes of the crate `tailscale`: one echoes datagrams, the other counts the answers."""

import json
import re

URL = "http://mesh.example.org:8080"
COUNT = 20

start_all()

with subtest("coordinator and relay are up"):
    hub.wait_for_unit("lacis-coordinator.service", timeout=30)
    relay.wait_for_unit("lacis-relay.service", timeout=30)

with subtest("a user and two keys"):
    hub.succeed("lacis admin users create crate")
    for node in (ann, ben):
        key = json.loads(hub.succeed("lacis admin keys create --user crate --json"))["key"]
        node.succeed(f"umask 077; echo {key} > /tmp/auth-key")

with subtest("the first joins"):
    ann.succeed(f"interop-peer {URL} /tmp/auth-key ann echo 7 > /tmp/echo.log 2>&1 &")
    ann.wait_until_succeeds("grep -q '^echoing at' /tmp/echo.log", timeout=60)
    address = re.search(r"^address (\S+)$", ann.succeed("cat /tmp/echo.log"), re.M).group(1)

with subtest("the second joins and is answered through the relay"):
    said = ben.succeed(f"interop-peer {URL} /tmp/auth-key ben send {address} 7 {COUNT}", timeout=120)
    assert f"answered {COUNT} of {COUNT}" in said, said

with subtest("the coordinator knows both"):
    nodes = {node["name"]: node for node in json.loads(hub.succeed("lacis admin nodes list --json"))}
    assert set(nodes) == {"ann", "ben"}, nodes
    assert address in nodes["ann"]["addresses"], nodes["ann"]
    assert nodes["ann"]["online"], nodes["ann"]
