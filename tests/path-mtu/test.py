"""Machines behind narrow, silent uplinks copy data to one on the internet and back."""

import time

URL = "https://mesh.example.org"
NARROW = {"at-1500": at_1500, "at-1420": at_1420, "at-1280": at_1280}
ports = iter(range(7001, 7100))


def copy_both_ways(name, machine):
    """Two copies; says how long they took."""
    began = time.monotonic()
    copy(machine, far, "far", next(ports))
    copy(far, machine, name, next(ports))
    log.info(f"      two copies in {time.monotonic() - began:.1f} s")


start_all()

with subtest("all join"):
    join(hub, URL, far, no_fragments, *NARROW.values())

for name, machine in NARROW.items():
    with subtest(f"{name.removeprefix('at-')} bytes: copies both ways on the direct path"):
        machine.succeed("lacis ping far", timeout=30)
        copy_both_ways(name, machine)
        assert way(machine, "far") and way(far, name), "the path is no longer direct"

with subtest("1280 bytes and no fragments: copies both ways over the relay"):
    for _ in range(2):
        said = no_fragments.succeed("lacis ping --until-direct=false -c 3 far", timeout=30)
        assert said.count("via DERP") == 3, said
        copy_both_ways("no-fragments", no_fragments)
    assert not way(no_fragments, "far") and not way(far, "no-fragments"), "the path is believed to be direct"

with subtest("and it is said why"):
    said = no_fragments.succeed("lacis ping --why --until-direct=false -c 1 far", timeout=30)
    assert "MTU below 1360" in said, said
    log.info(said.strip())
