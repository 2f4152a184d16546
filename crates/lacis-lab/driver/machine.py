"""A machine as scripts see it: the methods of the NixOS test driver, on a host made of namespaces.

Names, arguments and results are the NixOS driver's, so that a scenario's script runs unchanged in virtual machines.
What only virtual machines have (screens, keys, the QEMU monitor) is not here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services import Unit

if TYPE_CHECKING:
    from driver import Lab

LAB = Path("/run/lab")
# How often something that is waited for is looked at. The NixOS driver takes a second.
PAUSE = 0.2
CLONE_NEWPID = 0x20000000
LIBC = ctypes.CDLL(None, use_errno=True)


class MachineError(Exception):
    """Something that a machine should have done, and did not."""


@contextlib.contextmanager
def children_in(process: int) -> Iterator[None]:
    """Processes that this thread starts are born into the PID namespace of `process`."""

    def enter(path: str) -> None:
        namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if LIBC.setns(namespace, CLONE_NEWPID) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter {path}")
        finally:
            os.close(namespace)

    enter(f"/proc/{process}/ns/pid")
    try:
        yield
    finally:
        enter("/proc/self/ns/pid")


class Machine:
    """One node of the topology."""

    def __init__(self, lab: Lab, name: str, node: dict[str, Any]) -> None:
        self.lab = lab
        self.name = name
        self.node = node
        self.home = LAB / "hosts" / name
        self.booted = False
        self.allow_reboot = False
        self.boots = 0
        self.first = 0
        self.supervisor: subprocess.Popen[str] | None = None
        self.units = {data["name"]: Unit(self, data, lab.out_dir) for data in node["units"]}
        self.starting = threading.RLock()

    # -- life ---------------------------------------------------------------

    def start(self, allow_reboot: bool = False) -> None:
        """Boots it; its services start by themselves. Does not wait for them."""
        with self.starting:
            if self.booted:
                return
            self.allow_reboot = allow_reboot
            command = [str(LAB / "bin" / "lacis-lab"), "boot", self.name]
            if self.boots:
                command.append("--again")
            self.supervisor = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=self.lab.notes, stdin=subprocess.DEVNULL, text=True
            )
            assert self.supervisor.stdout is not None
            said = self.supervisor.stdout.readline().split()
            if not said or said[0] != "up":
                raise MachineError(f"{self.name} did not boot; see driver.log")
            self.first = int(said[1])
            (self.home / "pid").write_text(f"{self.first}\n")
            self.booted = True
            self.boots += 1
            for unit in self.units.values():
                threading.Thread(target=unit.start, daemon=True).start()

    def connect(self) -> None:
        """Waits until commands can be run, which is at once."""
        self.start()

    def is_up(self) -> bool:
        """Whether it runs."""
        return self.booted

    def crash(self) -> None:
        """Ends everything on it at once, as pulling the plug does."""
        with self.starting:
            if not self.booted:
                return
            for unit in self.units.values():
                unit.forget()
            os.kill(self.first, signal.SIGKILL)
            if self.supervisor is not None:
                self.supervisor.wait()
            self.booted = False

    def shutdown(self) -> None:
        """Stops its services, then everything."""
        if not self.booted:
            return
        stoppers = [threading.Thread(target=unit.stop) for unit in self.units.values()]
        for stopper in stoppers:
            stopper.start()
        for stopper in stoppers:
            stopper.join()
        self.crash()

    def wait_for_shutdown(self) -> None:
        """Waits until it is off."""
        self.retry(lambda: not self.booted, "it is off", 60)

    def reboot(self) -> None:
        """Shuts it down and boots it; as with the NixOS driver, only a machine that was started so (see `reboot` of common.py)."""
        if not self.allow_reboot:
            raise MachineError(f"{self.name}: reboot() needs start(allow_reboot=True)")
        self.shutdown()
        self.start(allow_reboot=True)

    def block(self) -> None:
        """Pulls its cable: links lose their carrier, addresses and routes stay."""
        link = self.node["uplink"]
        self._link(link["other"], ["link", "set", link["other_device"], "down"])

    def unblock(self) -> None:
        """Puts the cable back."""
        link = self.node["uplink"]
        self._link(link["other"], ["link", "set", link["other_device"], "up"])
        for address in link["other_addresses"]:
            self._link(link["other"], ["addr", "replace", address, "dev", link["other_device"]])
        for route in link["other_routes"]:
            self._link(link["other"], ["route", "replace", *route.split()])

    @staticmethod
    def _link(namespace: str, command: list[str]) -> None:
        subprocess.run(["ip", "-n", namespace, *command], check=True)

    # -- commands -----------------------------------------------------------

    def spawn(
        self, command: list[str], environment: dict[str, str] | None = None, **how: Any
    ) -> subprocess.Popen[bytes]:
        """Starts a program on the machine, in a process group of its own."""
        enter = ["nsenter", f"--target={self.first}", "--net", "--mount", "--uts", "--ipc", "--"]
        with children_in(self.first):
            return subprocess.Popen(
                [*enter, *command],
                env={**self.lab.environment, **(environment or {})},
                start_new_session=True,
                **how,
            )

    def execute(
        self, command: str, check_return: bool = True, check_output: bool = True, timeout: float | None = 900
    ) -> tuple[int, str]:
        """Runs a shell command; its exit status and standard output."""
        status, output, _ = self._run(command, check_return, check_output, timeout)
        return status, output

    def _run(
        self, command: str, check_return: bool = True, check_output: bool = True, timeout: float | None = 900
    ) -> tuple[int, str, str]:
        self.start()
        began = time.monotonic()
        with tempfile.TemporaryFile() as errors:
            process = self.spawn(
                ["bash", "-c", f"set -euo pipefail; {command}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if check_output else subprocess.DEVNULL,
                stderr=errors,
            )
            if not check_output:
                return -2, "", ""
            status = None
            try:
                output, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
                status = 124
            text = output.decode(errors="replace")
            errors.seek(0)
            wrong = errors.read().decode(errors="replace")
            status = process.returncode if status is None else status
            took = time.monotonic() - began
            self.lab.note(f"{self.name}: {command}\n[{status} in {took:.2f} s] {text}{wrong}".rstrip())
            return (status if check_return else -1), text, wrong

    def succeed(self, *commands: str, timeout: float | None = None) -> str:
        """Runs commands that must succeed; their output."""
        output = ""
        for command in commands:
            self.lab.tell(f"{self.name}: must succeed: {command}")
            status, text, wrong = self._run(command, timeout=timeout)
            if status != 0:
                raise MachineError(self._failure(command, f"failed ({status})", text, wrong))
            output += text
        return output

    def fail(self, *commands: str, timeout: float | None = None) -> str:
        """Runs commands that must fail; their output."""
        output = ""
        for command in commands:
            self.lab.tell(f"{self.name}: must fail: {command}")
            status, text, wrong = self._run(command, timeout=timeout)
            if status == 0:
                raise MachineError(self._failure(command, "succeeded, and should not have", text, wrong))
            output += text
        return output

    def wait_until_succeeds(self, command: str, timeout: float = 900) -> str:
        """Runs a command again and again until it succeeds; its output."""
        return self._wait_until(command, timeout, True)

    def wait_until_fails(self, command: str, timeout: float = 900) -> str:
        """Runs a command again and again until it fails; its output."""
        return self._wait_until(command, timeout, False)

    def _wait_until(self, command: str, timeout: float, success: bool) -> str:
        word = "success" if success else "failure"
        self.lab.tell(f"{self.name}: waiting for {word}: {command}")
        end = time.monotonic() + timeout
        while True:
            status, text, wrong = self._run(command, timeout=max(end - time.monotonic(), 0.1))
            if (status == 0) == success:
                return text
            if time.monotonic() >= end:
                raise MachineError(self._failure(command, f"no {word} in {timeout} s, last ({status})", text, wrong))
            time.sleep(PAUSE)

    def _failure(self, command: str, what: str, text: str, wrong: str) -> str:
        said = "".join(f"\n    {line}" for line in (text + wrong).splitlines()[-30:])
        return f"{self.name}: command `{command}` {what}{said}"

    def sleep(self, secs: float) -> None:
        """Waits, by the machine's own clock."""
        time.sleep(secs)

    # -- units --------------------------------------------------------------

    def _unit(self, name: str) -> Unit:
        unit = self.units.get(name.removesuffix(".service"))
        if unit is None:
            raise MachineError(f"{self.name} has no unit {name}; it has {', '.join(self.units) or 'none'}")
        return unit

    def systemctl(self, q: str, user: str | None = None) -> tuple[int, str]:
        """What `systemctl Q` would do and say."""
        if user is not None:
            raise MachineError("a bare host has no units of users")
        self.start()
        self.lab.tell(f"{self.name}: systemctl {q}")
        words = shlex.split(q)
        options = [word for word in words if word.startswith("-")]
        verb, *names = [word for word in words if not word.startswith("-")]
        status, said = 0, []
        for unit in [self._unit(name) for name in names]:
            match verb:
                case "start":
                    status = status if unit.start() else 1
                case "stop":
                    unit.stop()
                case "restart" | "try-restart":
                    if verb == "restart" or unit.state == "active":
                        unit.stop()
                        status = status if unit.start() else 1
                case "reload":
                    status = status if unit.reload() else 1
                case "kill":
                    wanted = [o.split("=", 1)[1] for o in options if o.startswith("--signal=")] or ["SIGTERM"]
                    name = wanted[0] if wanted[0].startswith("SIG") else f"SIG{wanted[0]}"
                    unit.kill(signal.Signals[name])
                case "is-active":
                    said.append(unit.state)
                    status = status if unit.state == "active" else 3
                case "is-failed":
                    said.append(unit.state)
                    status = status if unit.state == "failed" else 1
                case "show":
                    said.extend(f"{key}={value}" for key, value in unit.info().items())
                case "reset-failed":
                    if unit.state == "failed":
                        unit.forget()
                case _:
                    raise MachineError(f"systemctl {verb}: not on a bare host")
        return status, "".join(f"{line}\n" for line in said)

    def start_job(self, jobname: str, user: str | None = None) -> None:
        """Starts a unit and waits until it is up; a failure shows in its state."""
        self.systemctl(f"start {jobname}", user)

    def stop_job(self, jobname: str, user: str | None = None) -> None:
        """Stops a unit and waits until it is gone."""
        self.systemctl(f"stop {jobname}", user)

    def get_unit_info(self, unit: str, user: str | None = None) -> dict[str, str]:
        """The properties of a unit."""
        del user
        return self._unit(unit).info()

    def get_unit_property(self, unit: str, property: str, user: str | None = None) -> str:
        """One property of a unit."""
        del user
        return self._unit(unit).info()[property]

    def require_unit_state(self, unit: str, require_state: str = "active") -> None:
        """Fails if a unit is in another state."""
        state = self._unit(unit).state
        if state != require_state:
            raise MachineError(f"{self.name}: {unit} is {state}, not {require_state}")

    def wait_for_unit(self, unit: str, user: str | None = None, timeout: float = 900) -> None:
        """Waits until a unit is active; fails at once if it failed or nobody starts it."""
        del user
        self.start()
        self.lab.tell(f"{self.name}: waiting for unit {unit}")
        if unit.endswith(".target"):
            return
        it = self._unit(unit)
        end = time.monotonic() + timeout
        while it.state != "active":
            if it.state == "failed" or (it.state == "inactive" and time.monotonic() > end - timeout + 2):
                raise MachineError(f"{self.name}: {unit} is {it.state}\n{it.tail()}")
            if time.monotonic() >= end:
                raise MachineError(f"{self.name}: {unit} is {it.state} after {timeout} s\n{it.tail()}")
            time.sleep(0.02)

    def wait_for_job(self, jobname: str) -> None:
        """Waits until a unit is active."""
        self.wait_for_unit(jobname)

    # -- facts --------------------------------------------------------------

    def wait_for_file(self, filename: str, timeout: float = 900) -> None:
        """Waits until a file is there."""
        self.wait_until_succeeds(f"test -e {shlex.quote(filename)}", timeout)

    def wait_for_open_port(self, port: int, addr: str = "localhost", timeout: float = 900) -> None:
        """Waits until something listens on a TCP port."""
        self.wait_until_succeeds(f"exec 3<>/dev/tcp/{addr}/{port}", timeout)

    def wait_for_closed_port(self, port: int, addr: str = "localhost", timeout: float = 900) -> None:
        """Waits until nothing listens on a TCP port."""
        self.wait_until_fails(f"exec 3<>/dev/tcp/{addr}/{port}", timeout)

    def wait_for_open_unix_socket(self, addr: str, is_datagram: bool = False, timeout: float = 900) -> None:
        """Waits until something listens on a Unix socket."""
        kind = "SOCK_DGRAM" if is_datagram else "SOCK_STREAM"
        probe = f"import socket; socket.socket(socket.AF_UNIX, socket.{kind}).connect({addr!r})"
        self.wait_until_succeeds(f"python3 -c {shlex.quote(probe)}", timeout)

    def wait_for_console_text(self, regex: str, timeout: float | None = None) -> None:
        """Waits until one of its units logs something that matches."""
        pattern = re.compile(regex)
        self.retry(lambda: pattern.search(self.get_console_log()) is not None, f"/{regex}/ in its logs", timeout or 900)

    def get_console_log(self) -> str:
        """The logs of its units."""
        return "".join(unit.tail(100_000) + "\n" for unit in self.units.values())

    def retry(self, fact: Callable[[], bool], what: str, timeout: float) -> None:
        """Waits for a fact."""
        end = time.monotonic() + timeout
        while not fact():
            if time.monotonic() >= end:
                raise MachineError(f"{self.name}: not in {timeout} s: {what}")
            time.sleep(PAUSE)

    # -- files --------------------------------------------------------------

    def copy_from_host(self, source: str, target: str) -> None:
        """Copies a file or folder from where the script runs to the machine."""
        self.start()
        path = Path(source)
        what = ["-C", str(path), "."] if path.is_dir() else ["-C", str(path.parent), path.name]
        packed = subprocess.run(["tar", "-c", *what], check=True, stdout=subprocess.PIPE).stdout
        if path.is_dir():
            unpack = f"mkdir -p {shlex.quote(target)} && tar -x -C {shlex.quote(target)}"
        else:
            unpack = f'mkdir -p "$(dirname {shlex.quote(target)})" && tar -x -O > {shlex.quote(target)}'
        process = self.spawn(["bash", "-c", unpack], stdin=subprocess.PIPE, stderr=self.lab.notes)
        process.communicate(packed)
        if process.returncode != 0:
            raise MachineError(f"{self.name}: cannot copy {source} to {target}")

    def copy_from_host_via_shell(self, source: str, target: str) -> None:
        """Copies a file from where the script runs to the machine."""
        self.copy_from_host(source, target)

    def copy_from_vm(self, source: str, target_dir: str = "") -> None:
        """Copies a file or folder from the machine to where the run's logs are."""
        target = self.lab.out_dir / target_dir
        target.mkdir(parents=True, exist_ok=True)
        path = Path(source)
        command = ["tar", "-c", "-C", str(path.parent), path.name]
        process = self.spawn(command, stdout=subprocess.PIPE, stderr=self.lab.notes)
        packed, _ = process.communicate()
        subprocess.run(["tar", "-x", "-C", str(target)], input=packed, check=True)

    def copy_from_machine(self, source: str, target_dir: str = "") -> None:
        """The newer name of `copy_from_vm`."""
        self.copy_from_vm(source, target_dir)

    # -- words --------------------------------------------------------------

    def log(self, msg: str) -> None:
        """Says something about this machine."""
        self.lab.tell(f"{self.name}: {msg}")

    @contextlib.contextmanager
    def nested(self, msg: str) -> Iterator[None]:
        """Says what the commands inside are for."""
        self.log(msg)
        yield

    def dump(self) -> None:
        """Writes what the kernel knows of the machine's network beside the logs."""
        script = "ip addr; ip rule; ip route show table all; ip -6 route show table all; nft list ruleset; ss -tunap; cat /proc/net/nf_conntrack; cat /etc/resolv.conf"
        with (self.lab.out_dir / f"{self.name}.state").open("wb") as out:
            for command in script.split("; "):
                out.write(f"$ {command}\n".encode())
                out.flush()
                if self.booted:
                    self.spawn(shlex.split(command), stdin=subprocess.DEVNULL, stdout=out, stderr=out).wait(10)
        sys.stdout.flush()
