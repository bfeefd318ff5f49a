"""Measurements that survive a crash: one process measures, and another one starts it again.

After a CUDA error such as an illegal access, every later call of the process fails, and a kernel that hangs blocks it
for good. The process that measures therefore writes to a file what it begins and what is done. If it dies, asks for a
new process, or makes no progress for some time, another one is started and does the rest.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

RESTART = 75
"""The exit status with which a process asks to be started again."""

GRACE = 60.0
"""Seconds after the end of its time at which a process is killed."""

MAX_STARTS = 12


@dataclass
class Progress:
    """What a run has begun and done so far, in a file that is replaced as a whole."""

    path: Path
    until: float
    """When nothing more is begun, as `time.time()`."""

    done: list[str] = field(default_factory=list)
    running: str = ""
    part: str = ""
    """The part of `running` that is at work, "" if it has no parts."""

    broken: dict[str, str] = field(default_factory=dict)
    """By the name of a piece of work, why the process ended during it."""

    excluded: dict[str, str] = field(default_factory=dict)
    """By the name of a part, why the process ended during it. The rest of the piece is begun again without it."""

    payload: Any = None
    """Data that a process leaves for the next one."""

    @classmethod
    def load(cls, path: Path) -> Progress:
        """Read what another process of the same program saved."""
        progress: Progress = pickle.loads(path.read_bytes())
        return progress

    def save(self) -> None:
        unfinished = self.path.with_name(f"{self.path.name}.part")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(pickle.dumps(self))
        unfinished.replace(self.path)

    def begin(self, name: str) -> None:
        """Note that work on `name` begins."""
        self.running, self.part = name, ""
        self.save()

    def focus(self, part: str) -> None:
        """Note which part of the work is next. If the process ends now, only this part is left out afterwards."""
        self.part = part
        self.save()

    def end(self, payload: Any = None, name: str = "") -> None:
        """Note that `name`, or else the work that was begun last, is done."""
        self.done.append(name or self.running)
        self.running, self.part, self.payload = "", "", payload
        self.save()

    def blame(self, reason: str) -> None:
        """Note that the process ended during the work that it began last, or during a part of it."""
        if self.part:
            self.excluded[self.part] = reason
        else:
            self.broken[self.running] = reason
        self.running = self.part = ""
        self.save()


class Spoiled(Exception):
    """An error after which every later call on the device fails: the process has to end."""


def is_spoiled(device: torch.device) -> bool:
    """Return whether an earlier error makes every later call on this device fail."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def supervise_module(module: str, arguments: Sequence[str], seconds: float, stall: float) -> int:
    """Run `python -m module <arguments> --worker FILE` as `supervise` does, with its progress in a temporary file."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = Path(folder) / "progress"
        return supervise([sys.executable, "-m", module, *arguments, "--worker", str(path)], path, seconds, stall)


def supervise(command: Sequence[str], path: Path, seconds: float, stall: float) -> int:
    """Run `command` until it ends by itself, and return its exit status; return 1 if it never does.

    The command finds its `Progress` in the file `path`. It is started again if it exits with RESTART, is ended by a
    signal, or saves no progress for `stall` seconds.
    """
    progress = Progress(path, time.time() + seconds)
    progress.save()
    for _ in range(MAX_STARTS):
        status, reason = _run_once(command, path, progress.until + GRACE, stall)
        if not reason:
            return status
        progress = Progress.load(path)
        print(f"✗ {progress.running or 'between two measurements'}: {reason}", flush=True)
        if progress.running:
            progress.blame(reason)
        if time.time() > progress.until + GRACE:
            break
    return 1


def _run_once(command: Sequence[str], path: Path, end: float, stall: float) -> tuple[int, str]:
    """Return the exit status, and why the command did not end by itself ("" if it did)."""
    path.touch()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        while (status := process.poll()) is None:
            quiet = time.time() - path.stat().st_mtime
            if quiet > stall or time.time() > end:
                return 1, f"the process was ended: nothing measured for {quiet:.0f} s"
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status == RESTART:
        return status, "an error spoiled the CUDA context, and a new process goes on"
    return status, f"the process was ended by signal {-status}" if status < 0 else ""
