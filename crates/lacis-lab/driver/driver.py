"""Runs one scenario's script against the lab's hosts.

Started by `lacis-lab` as `driver.py JOB` inside the run's namespaces. The script sees what a script of the NixOS test
driver sees: every node by name, `start_all`, `subtest`, `retry`, … Ends 0 if the script did.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from machine import LAB, Machine, MachineError


class Stopped(BaseException):
    """Somebody pressed Ctrl-C, or the run was ended."""


class Lab:
    """The run: its machines, its logs, its clock."""

    def __init__(self, job: dict[str, Any]) -> None:
        plan = job["plan"]
        self.job = job
        self.name: str = plan["name"]
        self.began = time.monotonic()
        # The NixOS driver's name for where a script may leave files.
        self.out_dir = Path(job["logs"])
        # What all scenarios of a folder share, if there is something, and the scenario's own.
        folder = Path(job["folder"])
        self.scripts = [folder.parent / "common.py", folder / "test.py"]
        self.notes = (self.out_dir / "driver.log").open("a", buffering=1)
        self.verbose: bool = job["verbose"]
        self.depth = 0
        self.environment = {
            "PATH": f"{LAB}/bin:{os.environ.get('PATH', '')}",
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            "TERM": os.environ.get("TERM", "dumb"),
            "SSL_CERT_FILE": str(LAB / "ca.pem"),
            "RUST_LOG": os.environ.get("RUST_LOG", "info"),
            "RUST_BACKTRACE": "1",
            # The independent crate asks for this word before it works at all.
            "TS_RS_EXPERIMENT": "this_is_unstable_software",
        }
        self.machines = {name: Machine(self, name, node) for name, node in plan["nodes"].items()}

    def clock(self) -> str:
        """Seconds since the run began."""
        return f"{time.monotonic() - self.began:8.3f}"

    def note(self, text: str) -> None:
        """Writes to the driver's log."""
        self.notes.write(f"{self.clock()} {text}\n")

    def tell(self, text: str) -> None:
        """Writes to the log, and to the screen if asked for."""
        self.note(text)
        if self.verbose:
            print(f"{self.clock()} {text}", flush=True)

    def hosts(self) -> list[Machine]:
        """Machines that are neither routers nor the internet."""
        return [machine for machine in self.machines.values() if machine.node["role"] == "host"]

    def start_all(self) -> None:
        """Boots every machine; routers that serve their networks are ready before."""
        routers = [machine for machine in self.machines.values() if machine.node["role"] == "router" and machine.units]
        self.boot(routers)
        for router in routers:
            for unit in router.units:
                router.wait_for_unit(unit, timeout=30)
        self.boot(self.hosts())

    @staticmethod
    def boot(machines: list[Machine]) -> None:
        """Boots some machines at once."""
        failures: list[BaseException] = []

        def start(machine: Machine) -> None:
            try:
                machine.start()
            except (MachineError, OSError) as error:
                failures.append(error)

        threads = [threading.Thread(target=start, args=(machine,)) for machine in machines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    @contextlib.contextmanager
    def subtest(self, name: str) -> Iterator[None]:
        """Names a part of the script and says how long it took."""
        self.note(f"subtest: {name}")
        began = time.monotonic()
        try:
            yield
        except BaseException:
            print(f"FAIL  {name} (after {time.monotonic() - began:.1f} s)", flush=True)
            raise
        print(f"ok    {name} ({time.monotonic() - began:.1f} s)", flush=True)

    def serve_names(self) -> None:
        """Starts the internet's name server."""
        internet = self.machines["internet"]
        internet.start()
        names = LAB / "names.json"
        names.write_text(json.dumps(self.job["plan"]["names"]))
        command = ["python3", "-B", str(LAB / "driver/nameserver.py"), str(names)]
        process = internet.spawn(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.notes)
        assert process.stdout is not None
        if process.stdout.readline().strip() != b"ready":
            raise MachineError("the internet's name server does not start; see driver.log")

    def explain(self, error: BaseException) -> None:
        """Says what went wrong and where in the script, and keeps what the kernel knows."""
        scripts = [str(script) for script in self.scripts]
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in scripts]
        for frame in frames:
            print(f"  {Path(frame.filename).relative_to(self.scripts[0].parent)}:{frame.lineno}: {frame.line}")
        words = str(error) or type(error).__name__
        prefix = "" if isinstance(error, MachineError) else f"{type(error).__name__}: "
        print(f"  {prefix}{words}")
        if not isinstance(error, (MachineError, AssertionError)):
            self.note("".join(traceback.format_exception(error)))
            if not frames:
                traceback.print_exception(error)
        for machine in self.machines.values():
            with contextlib.suppress(Exception):
                machine.dump()
            for unit in machine.units.values():
                print(f"--- {machine.name}: {unit.name} is {unit.state}; its last words:")
                print(unit.tail(15))
        sys.stdout.flush()

    def stay(self) -> None:
        """Leaves everything up until somebody ends it."""
        process = (self.out_dir / "pid").read_text().strip()
        host = self.hosts()[0].name
        print(f"\nAll is up until Ctrl-C. To get to a host, from another terminal:")
        print(f"  ./scripts/lab shell {host}")
        print(f"  nsenter -t {process} -a sh {LAB}/enter {host}")
        sys.stdout.flush()
        while True:
            signal.pause()


def retry(fn: Callable[[bool], bool], timeout_seconds: float = 900) -> None:
    """Calls `fn` until it gives True; it is told when it is the last time."""
    end = time.monotonic() + timeout_seconds
    while time.monotonic() < end:
        if fn(False):
            return
        time.sleep(0.2)
    if not fn(True):
        raise MachineError(f"not in {timeout_seconds} s")


class Log:
    """The object `log` of a script."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def info(self, text: str) -> None:
        """Says something."""
        print(text, flush=True)
        self.lab.note(text)

    warning = error = log = info

    @contextlib.contextmanager
    def nested(self, text: str) -> Iterator[None]:
        """Says what the commands inside are for."""
        self.lab.tell(text)
        yield


def names_for(lab: Lab) -> dict[str, Any]:
    """What a script finds without importing anything."""
    machines = {name.replace("-", "_"): machine for name, machine in lab.machines.items()}
    names: dict[str, Any] = {
        "machines": lab.hosts(),
        "start_all": lab.start_all,
        "join_all": lambda: [machine.wait_for_shutdown() for machine in lab.hosts()],
        "subtest": lab.subtest,
        "retry": retry,
        "log": Log(lab),
        "driver": lab,
        "os": os,
        "Machine": Machine,
        "t": unittest.TestCase(),
        "expect": lab.job["expect"],
        "__name__": "test_script",
        "__file__": str(Path(lab.job["folder"]) / "test.py"),
    }
    if len(lab.hosts()) == 1:
        names["machine"] = lab.hosts()[0]
    return {**names, **machines}


def main() -> int:
    """Runs the job that is named on the command line."""
    job = json.loads(Path(sys.argv[1]).read_text())
    lab = Lab(job)

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(which, signal.SIG_IGN)
        raise Stopped

    def late(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise MachineError(f"the script took longer than {job['plan']['timeout']} s (`timeout` in topology.toml)")

    for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(which, stop)
    signal.signal(signal.SIGALRM, late)
    signal.alarm(job["plan"]["timeout"])

    status = 0
    try:
        try:
            lab.serve_names()
            names = names_for(lab)
            for script in filter(Path.is_file, lab.scripts):
                exec(compile(script.read_text(), str(script), "exec"), names)
        except Exception as error:
            signal.alarm(0)
            lab.explain(error)
            status = 1
        signal.alarm(0)
        if job["keep"]:
            lab.stay()
    except Stopped:
        if not job["keep"]:
            print("stopped before the end", flush=True)
            status = 130
    lab.notes.flush()
    sys.stdout.flush()
    # What still runs ends with the namespaces; waiting for threads would only take time.
    os._exit(status)


if __name__ == "__main__":
    main()
