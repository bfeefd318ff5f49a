"""Measurements that outlive a crash: a process measures, another one starts it again.

After a CUDA error such as an illegal access, every later call of the process fails, and a kernel that hangs blocks it
for good. The process that measures therefore notes in a file what it begins and what it has done. If it dies, asks for
a new one, or makes no progress for some time, another one is started and does the rest.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

RESTART = 75
"""The exit status by which a process asks to be started again."""

GRACE = 60.0
"""Seconds after the end of the time at which a process is ended that has not ended by itself."""

MAX_STARTS = 12


@dataclass
class Progress:
    """What a run has begun and done so far."""

    path: Path
    until: float
    """When nothing more is begun, as `time.time()`."""

    done: list[str] = field(default_factory=list)
    running: str = ""
    broken: dict[str, str] = field(default_factory=dict)
    """Why the process ended that worked on it, by name."""

    excluded: dict[str, str] = field(default_factory=dict)
    """The same of what `focus` named: it is left out when the rest is begun again."""

    payload: Any = None
    """What the measuring process hands on to the one after it."""

    @classmethod
    def load(cls, path: Path) -> Progress:
        """Read what another process saved; both are runs of this program."""
        progress: Progress = pickle.loads(path.read_bytes())
        return progress

    def save(self) -> None:
        """Write everything, or nothing if this process is killed meanwhile."""
        part = self.path.with_name(f"{self.path.name}.part")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(pickle.dumps(self))
        part.replace(self.path)

    def begin(self, name: str) -> None:
        """Note that work on `name` begins."""
        self.running = name
        self._focused.unlink(missing_ok=True)
        self.save()

    @property
    def _focused(self) -> Path:
        return focus_path(self.path)

    def focus(self, part: str) -> None:
        """Note which part of what was begun is at work now: if the process ends, it is to blame and not the rest."""
        self._focused.write_text(part, encoding="utf-8")

    def end(self, payload: Any = None, name: str = "") -> None:
        """Note that `name`, or else the work begun last, is done."""
        self.done.append(name or self.running)
        self.running, self.payload = "", payload
        self.save()

    def blame(self, reason: str) -> None:
        """Note that the process ended while it worked on what it began last, or on a part of it."""
        if self._focused.exists():
            self.excluded[self._focused.read_text(encoding="utf-8")] = reason
        else:
            self.broken[self.running] = reason
        self.running = ""
        self._focused.unlink(missing_ok=True)
        self.save()


def focus_path(path: Path) -> Path:
    """Return the file beside a progress that says which part of a piece of work is going on."""
    return path.with_name(f"{path.name}.focus")


def last_change(path: Path) -> float:
    """Return when a progress was saved or its focus moved, as `time.time()`."""
    times = [path.stat().st_mtime]
    with contextlib.suppress(FileNotFoundError):
        times.append(focus_path(path).stat().st_mtime)
    return max(times)


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


def supervise(command: Sequence[str], path: Path, seconds: float, stall: float) -> int:
    """Run `command` until it ends by itself, and return its exit status; 1 if it never does.

    The command finds its `Progress` in the file `path`. It is started again where it exits with RESTART, is ended by a
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
            quiet = time.time() - last_change(path)
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
