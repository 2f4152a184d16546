"""Machines whose own networks lie in 100.64.0.0/10 join, go direct, and still reach their neighbours, and these them."""

URL = "https://mesh.example.org"
CLIENTS = {"far": far, "phone": phone, "laptop": laptop}
# Who has which neighbour outside the mesh.
NEIGHBOURS = [(phone, mast), (laptop, printer)]


def neighbours_meet():
    for machine, neighbour in NEIGHBOURS:
        gateway = machine.succeed("ip route show default dev eth0").split()[2]
        machine.succeed(f"ping -c 1 -W 2 {gateway}", f"ping -c 1 -W 2 {address(neighbour)}")
        machine.succeed(f"curl -fsS -o /dev/null -m 5 http://{address(neighbour)}:8000/")
        neighbour.succeed(f"ping -c 1 -W 2 {address(machine)}")
        neighbour.succeed(f"curl -fsS -o /dev/null -m 5 http://{address(machine)}:8000/")


start_all()

with subtest("neighbours reach each other"):
    for machine, neighbour in NEIGHBOURS:
        for one in (machine, neighbour):
            one.succeed("python3 -m http.server --directory /tmp 8000 > /dev/null 2>&1 &")
            one.wait_for_open_port(8000, timeout=10)
    neighbours_meet()

with subtest("all join"):
    join(hub, URL, *CLIENTS.values())

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
