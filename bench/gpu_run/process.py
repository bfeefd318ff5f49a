"""Run the commands of a stage within a time, with their output in a log, and pack the results while they run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

INTERRUPTED, KILLED = "interrupted after its time", "killed after its time"
PATIENCE = 8.0
"""Seconds between the interrupt of a command and its end by force."""

LARGEST_PACKED = 8 << 20
"""Bytes. Larger files are not packed: an archive that is too large may not travel at all."""


class Outcome(NamedTuple):
    """The end of a stage."""

    status: int
    """0 if every command returned 0, otherwise the status of the last one that did not."""

    seconds: float
    note: str
    """INTERRUPTED, KILLED, or the last line of the log."""


@dataclass
class Runner:
    """Runs commands in a folder. `while_running` is called every `every` seconds, to save results early."""

    environment: Mapping[str, str]
    folder: Path
    while_running: Callable[[], None] = lambda: None
    every: float = 15.0

    def run(self, commands: Sequence[Sequence[str]], log: Path, seconds: float) -> Outcome:
        """Run commands one after the other, all of them within `seconds`."""
        begin, status, note = time.monotonic(), 0, ""
        with log.open("wb") as output:
            for command in commands:
                left = seconds - (time.monotonic() - begin)
                if left <= 0:
                    return Outcome(1, time.monotonic() - begin, f"no time was left for: {' '.join(command)[:80]}")
                output.write(f"$ {' '.join(command)}\n".encode())
                output.flush()
                code, note = self._run_one(command, output, left)
                status = code or status
        return Outcome(status, time.monotonic() - begin, note or _last_line(log))

    def _run_one(self, command: Sequence[str], output: IO[bytes], seconds: float) -> tuple[int, str]:
        """Return the exit status of one command, and a note if it was ended.

        coreutils' `timeout` interrupts the command and all that it started, and ends them by force if they go on.
        """
        limited = ["timeout", "--signal=INT", f"--kill-after={PATIENCE}", f"{seconds:.2f}", *command]
        end = time.monotonic() + seconds
        process = subprocess.Popen(
            limited, stdout=output, stderr=output, cwd=self.folder, env=dict(self.environment), start_new_session=True
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(self.every)
                    break
                self.while_running()
        finally:  # also what the command has left behind, and everything if this process is ended
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if time.monotonic() < end:
            return status, ""
        return status, KILLED if status in (137, -signal.SIGKILL) else INTERRUPTED


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def pack_results(folder: Path, archive: Path) -> None:
    """Write the files of `folder` to `archive`, whole or not at all. left_out.txt names those that are too large."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "left_out.txt")
    large = [path for path in files if path.stat().st_size > LARGEST_PACKED]
    note = folder / "left_out.txt"
    note.write_text("".join(f"{path.relative_to(folder)}: {path.stat().st_size:,} bytes\n" for path in large))
    part = archive.with_name(f"{archive.name}.part")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(part, "w:gz", compresslevel=3) as tar:
        for path in [note, *(path for path in files if path not in large)]:
            if path.exists():  # a running command may have removed it
                tar.add(path, path.relative_to(folder.parent))
    part.replace(archive)
