"""Runs a stage: commands within a time, their output in a log, their results packed while they run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

INTERRUPTED, KILLED = "interrupted after its time", "killed after its time"
PATIENCE = 8.0
"""Seconds from the interrupt of a command to its end by force."""

LARGEST_PACKED = 8 << 20
"""Bytes; what is larger than this stays where it is: an archive that is too large may not travel at all."""


class Outcome(NamedTuple):
    """How a stage ended."""

    status: int
    """0 if every command returned 0, otherwise the status of the last one that did not."""

    seconds: float
    note: str
    """INTERRUPTED, KILLED, or the last line of the log."""


def run_commands(
    commands: Sequence[Sequence[str]],
    log: Path,
    seconds: float,
    environment: Mapping[str, str],
    folder: Path,
    while_running: Callable[[], None] = lambda: None,
    every: float = 15.0,
) -> Outcome:
    """Run commands one after the other in `folder`, all of them within `seconds`.

    `while_running` is called every `every` seconds, so that results can be saved before everything is killed.
    """
    begin, status, note = time.monotonic(), 0, ""
    with log.open("wb") as output:
        for command in commands:
            left = seconds - (time.monotonic() - begin)
            if left <= 0:
                return Outcome(1, time.monotonic() - begin, f"no time was left for: {' '.join(command)[:80]}")
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            code, note = _run(command, output, left, environment, folder, while_running, every)
            status = code or status
    return Outcome(status, time.monotonic() - begin, note or _last_line(log))


def _run(
    command: Sequence[str],
    output: IO[bytes],
    seconds: float,
    environment: Mapping[str, str],
    folder: Path,
    while_running: Callable[[], None],
    every: float,
) -> tuple[int, str]:
    """Return the exit status of one command, and a note where it was ended."""
    try:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=folder, env=dict(environment), start_new_session=True
        )
    except OSError as error:
        output.write(f"{error}\n".encode())
        return 127, ""
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            try:
                return process.wait(min(every, max(0.05, end - time.monotonic()))), ""
            except subprocess.TimeoutExpired:
                while_running()
        return _stop(process)
    except BaseException:  # this process is ended: so is what it started
        _kill(process, signal.SIGKILL)
        raise


def _stop(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Interrupt a command and all that it started; end them by force if they do not listen."""
    _kill(process, signal.SIGINT)
    note = INTERRUPTED
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        note = KILLED
    _kill(process, signal.SIGKILL)  # also what the command has left behind
    return process.wait() or 1, note


def _kill(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def pack(folder: Path, archive: Path) -> None:
    """Write everything in `folder` to `archive`, and to left_out.txt what is too large for it; whole or not at all."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "left_out.txt")
    large = [path for path in files if path.stat().st_size > LARGEST_PACKED]
    note = folder / "left_out.txt"
    note.write_text("".join(f"{path.relative_to(folder)}: {path.stat().st_size:,} bytes\n" for path in large))
    part = archive.with_name(f"{archive.name}.part")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(part, "w:gz", compresslevel=3) as tar:
        for path in [note, *(path for path in files if path not in large)]:
            if path.exists():  # what runs meanwhile may have taken it away
                tar.add(path, path.relative_to(folder.parent))
    part.replace(archive)
