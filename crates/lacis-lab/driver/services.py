"""Units of a bare host: starts, watches and stops programs as their unit files say, where there is no systemd.

A unit is what `units.rs` read from a unit file. Kept to: Type=notify, ExecReload=, Restart=, RestartSec=,
RestartPreventExitStatus=, StateDirectory=, RuntimeDirectory=, Environment=, EnvironmentFile=; a stop is SIGTERM to the
whole group and SIGKILL after a while.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from machine import Machine

# systemd's are 90 s; nothing of ours needs a tenth of that.
START_LIMIT = 30.0
STOP_LIMIT = 10.0


def read_variables(home: Path, path: str) -> dict[str, str]:
    """What an EnvironmentFile= below /etc sets: lines NAME=VALUE, quoted or not."""
    file = home / path.removeprefix("-").removeprefix("/")
    if path.startswith("-") and not file.exists():
        return {}
    variables = {}
    for line in file.read_text().splitlines():
        name, sign, value = line.strip().partition("=")
        if sign and not name.startswith(("#", ";")):
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            variables[name] = value[1:-1] if quoted else value
    return variables


class Unit:
    """One unit on one machine."""

    def __init__(self, machine: Machine, data: dict[str, Any], logs: Path) -> None:
        self.machine = machine
        self.name: str = data["name"]
        self.data = data
        self.log = logs / f"{machine.name}-{self.name}.log"
        self.state = "inactive"
        self.result = "success"
        self.status = 0
        self.restarts = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.wanted = False
        self.changed = threading.Condition()
        # Grows with every start and stop, so that a watcher of an older process knows that it is not asked any more.
        self.turn = 0

    def _set(self, state: str) -> None:
        with self.changed:
            self.state = state
            self.changed.notify_all()

    def start(self) -> bool:
        """Starts it and waits until it is active (ready, if it says so); whether that worked."""
        with self.changed:
            if self.state in ("active", "activating"):
                return self._wait_active()
            self.wanted = True
            self.restarts = 0
            self.turn += 1
            self._launch(self.turn)
            return self._wait_active()

    def _wait_active(self) -> bool:
        end = time.monotonic() + START_LIMIT
        while self.state == "activating":
            if not self.changed.wait(end - time.monotonic()) and time.monotonic() >= end:
                return False
        return self.state == "active"

    def _launch(self, turn: int) -> None:
        home = self.machine.home
        environment = dict(self.data["environment"])
        for path in self.data["environment_files"]:
            environment.update(read_variables(home, path))
        for kind, root, mode in (("state", "var-lib", 0o700), ("runtime", "run", 0o755)):
            for folder in self.data[kind]:
                path = home / root / folder
                path.mkdir(parents=True, exist_ok=True)
                path.chmod(mode)
        listener = None
        if self.data["notify"]:
            path = home.parent.parent / f"{self.machine.name}-{self.name}.notify"
            path.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            listener.bind(str(path))
            environment["NOTIFY_SOCKET"] = str(path)
        with self.log.open("ab") as log:
            log.write(f"--- {self.machine.lab.clock()} {' '.join(self.data['command'])}\n".encode())
            log.flush()
            self.process = self.machine.spawn(
                self.data["command"], environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.state = "activating" if listener else "active"
        self.changed.notify_all()
        if listener:
            threading.Thread(target=self._listen, args=(listener, turn), daemon=True).start()
        threading.Thread(target=self._watch, args=(self.process, turn), daemon=True).start()

    def _listen(self, listener: socket.socket, turn: int) -> None:
        listener.settimeout(1)
        with listener:
            while self.turn == turn and self.process is not None:
                try:
                    said = listener.recv(4096).decode(errors="replace").splitlines()
                except TimeoutError:
                    continue
                with self.changed:
                    if "READY=1" in said and self.turn == turn and self.state == "activating":
                        self.state = "active"
                        self.changed.notify_all()

    def _watch(self, process: subprocess.Popen[bytes], turn: int) -> None:
        status = process.wait()
        with contextlib.suppress(OSError):
            with self.log.open("ab") as log:
                log.write(f"--- {self.machine.lab.clock()} ended with {status}\n".encode())
        with self.changed:
            if self.turn != turn:
                return
            self.status = status
            clean = status in (0, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
            self.result = "success" if clean else "signal" if status < 0 else "exit-code"
            again = self.data["restart"] == "always" or (self.data["restart"] == "on-failure" and not clean)
            if not again or status in self.data["restart_prevent"] or not self.wanted:
                self.process = None
                self.wanted = False
                self.state = "inactive" if clean else "failed"
                self.changed.notify_all()
                return
            self.state = "activating"
            self.changed.notify_all()
        time.sleep(self.data["restart_delay"])
        with self.changed:
            if self.turn == turn and self.wanted:
                self.restarts += 1
                self.turn += 1
                self._launch(self.turn)

    def stop(self) -> None:
        """Stops it and waits until it is gone."""
        with self.changed:
            process, self.wanted = self.process, False
            self.turn += 1
            self.process = None
            if self.state != "failed":
                self.state = "deactivating"
        if process is not None:
            end = time.monotonic() + STOP_LIMIT
            self._signal(process, signal.SIGTERM)
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.01)
            if process.poll() is None:
                self.machine.lab.note(f"{self.machine.name}: {self.name} did not stop in {STOP_LIMIT:.0f} s, killed")
                self._signal(process, signal.SIGKILL)
                process.wait()
        for folder in self.data["runtime"]:
            shutil.rmtree(self.machine.home / "run" / folder, ignore_errors=True)
        self._set("inactive")

    def forget(self) -> None:
        """The machine crashed: nothing runs any more and nothing starts again."""
        with self.changed:
            self.turn += 1
            self.wanted = False
            self.process = None
            self.state = "inactive"
            self.changed.notify_all()

    def kill(self, number: int) -> None:
        """Sends a signal to all its processes."""
        if self.process is not None:
            self._signal(self.process, number)

    @staticmethod
    def _signal(process: subprocess.Popen[bytes], number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    def reload(self) -> bool:
        """Runs what ExecReload= says; whether all of it worked."""
        for command in self.data["reload"]:
            if command[1:] == ["-HUP", "$MAINPID"]:
                self.kill(signal.SIGHUP)
                continue
            with self.log.open("ab") as log:
                process = self.machine.spawn(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                if process.wait(START_LIMIT) != 0:
                    return False
        return True

    def main_pid(self) -> int:
        """Its process, as the machine itself numbers it."""
        process = self.process
        if process is None:
            return 0
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("NSpid:"):
                    return int(line.split()[-1])
        return 0

    def info(self) -> dict[str, str]:
        """What `systemctl show` would say, as far as scripts ask."""
        substates = {"active": "running", "failed": "failed", "inactive": "dead", "activating": "start"}
        return {
            "Id": f"{self.name}.service",
            "ActiveState": self.state,
            "SubState": substates.get(self.state, "stop-sigterm"),
            "MainPID": str(self.main_pid()),
            "NRestarts": str(self.restarts),
            "ExecMainStatus": str(self.status),
            "Result": self.result,
        }

    def tail(self, lines: int = 20) -> str:
        """The end of its log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""
