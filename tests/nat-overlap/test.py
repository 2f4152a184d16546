"""Machines whose own networks lie in 100.64.0.0/10 join, go direct, and still reach their neighbours, and these them."""

import json

URL = "https://mesh.example.org"
CLIENTS = {"far": far, "phone": phone, "laptop": laptop}
# Who has which neighbour outside the mesh.
NEIGHBOURS = [(phone, mast), (laptop, printer)]


def own(machine):
    """Its address in its own network."""
    return machine.succeed("ip -4 -brief address show dev eth0").split()[2].split("/")[0]


def neighbours_meet():
    for machine, neighbour in NEIGHBOURS:
        gateway = machine.succeed("ip route show default dev eth0").split()[2]
        machine.succeed(f"ping -c 1 -W 2 {gateway}", f"ping -c 1 -W 2 {own(neighbour)}")
        machine.succeed(f"curl -fsS -o /dev/null -m 5 http://{own(neighbour)}:8000/")
        neighbour.succeed(f"ping -c 1 -W 2 {own(machine)}")
        neighbour.succeed(f"curl -fsS -o /dev/null -m 5 http://{own(machine)}:8000/")


start_all()

with subtest("neighbours reach each other"):
    for machine, neighbour in NEIGHBOURS:
        for one in (machine, neighbour):
            one.succeed("python3 -m http.server --directory /tmp 8000 > /dev/null 2>&1 &")
            one.wait_for_open_port(8000, timeout=10)
    neighbours_meet()

with subtest("all join"):
    hub.wait_for_unit("lacis-coordinator.service", timeout=30)
    hub.succeed("lacis admin users create family")
    key = json.loads(hub.succeed("lacis admin keys create --user family --reusable --json"))["key"]
    for machine in CLIENTS.values():
        machine.wait_for_unit("lacisd.service", timeout=30)
        machine.succeed(f"umask 077; printf %s {key} > /tmp/auth-key")
        machine.succeed(f"lacis up --login-server={URL} --auth-key=file:/tmp/auth-key --timeout=20s", timeout=30)
    for name, machine in CLIENTS.items():
        wait_for(lambda: peers(machine).keys() == CLIENTS.keys() - {name}, f"{name} sees the others")

with subtest("all reach each other"):
    for name, machine in CLIENTS.items():
        for other in CLIENTS.keys() - {name}:
            machine.succeed(f"ping -c 1 -W 5 {other}", timeout=20)

with subtest("neighbours still reach each other, and so does the coordinator"):
    neighbours_meet()
    for machine in CLIENTS.values():
        machine.succeed(f"curl -fsS -m 5 {URL}/health")

with subtest("all are direct"):
    for name, machine in CLIENTS.items():
        for other in CLIENTS.keys() - {name}:
            machine.succeed(f"lacis ping {other}", timeout=30)
