"""The bytes that the demo trains on: the Python sources of the standard library, or those of site-packages."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.demo.settings import Task

LARGEST_FILE = 1 << 20
"""Bytes of a file beyond which it is taken for a table rather than code."""

LEAST = 16 << 20
"""Bytes that site-packages must hold; where there are fewer, the standard library takes their place."""

HELD_OUT = 26
"""Files of 256 that are held out, about: one in ten."""

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "idle_test", "encodings", "pydoc_data"}
"""Folders of the standard library that are not read: some are not part of every installation (tests, IDLE, installed
packages), others hold tables rather than code (codecs, pydoc's topics)."""


class Corpus(NamedTuple):
    """Bytes to train on and bytes held out, both uint8 on one device."""

    train: Tensor
    held_out: Tensor
    source: str
    num_files: int

    def to(self, device: torch.device) -> Corpus:
        return self._replace(train=self.train.to(device), held_out=self.held_out.to(device))


def batches(data: Tensor, count: int, task: Task, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `count` batches of (inputs, targets), each [batch, length], from random places that `seed` decides.

    Places are drawn on the data's device, so that no step waits for the GPU.
    """
    generator = torch.Generator(data.device).manual_seed(seed)
    offsets = torch.arange(task.length + 1, device=data.device)
    for _ in range(count):
        starts = torch.randint(len(data) - task.length, (task.batch, 1), generator=generator, device=data.device)
        window = data[starts + offsets].long()
        yield window[:, :-1], window[:, 1:]


def split(files: Iterable[tuple[bytes, bytes]], source: str) -> Corpus:
    """Put whole files, given as (key, content), on the train side or the held-out side by a hash of their keys. Files
    whose key was seen before are left out."""
    sides, seen = (bytearray(), bytearray()), set()
    for key, content in files:
        digest = hashlib.sha256(key).digest()
        if digest not in seen:
            seen.add(digest)
            sides[digest[0] < HELD_OUT].extend(content)
    train, held_out = (torch.frombuffer(side, dtype=torch.uint8) for side in sides)
    return Corpus(train, held_out, source, len(seen))


# ---- the standard library ----------------------------------------------------------------------------------------


def standard_library() -> Corpus:
    """Read the standard library's sources. The hash of a file's name decides whether it is held out."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    chosen = (name for name in names if LEFT_OUT.isdisjoint(Path(name).parts))
    return split(((name.encode(), (root / name).read_bytes()) for name in chosen), "the standard library")


# ---- site-packages -----------------------------------------------------------------------------------------------


def read_corpus(max_bytes: int, folders: Sequence[Path] | None = None) -> Corpus:
    """Read at most `max_bytes` of the sources in site-packages, or the standard library where these hold little.

    The result depends on the files alone: neither on the order in which the file system lists them nor on threads.
    """
    paths, total = choose(site_packages() if folders is None else folders, max_bytes)
    if total < min(LEAST, max_bytes // 2):
        library = standard_library()
        return library._replace(train=library.train[:max_bytes], held_out=library.held_out[:max_bytes])
    with ThreadPoolExecutor(8) as pool:  # reading waits for the disk
        # The key is the content and not the path, so that copies of a file (vendored packages) are left out.
        return split(((content, content) for content in pool.map(Path.read_bytes, paths)), "site-packages")


def site_packages() -> list[Path]:
    """Return the folders of installed packages that this Python imports from."""
    folders = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return [*dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir())]


def choose(folders: Iterable[Path], max_bytes: int) -> tuple[list[Path], int]:
    """Return Python files below the folders until `max_bytes` are reached, and their bytes.

    Files come in the order of a digest of their names, so that a limit on bytes takes a fair share of every package
    instead of the first letters of the alphabet.
    """
    found = []
    for folder in folders:
        for path, size in _sources(folder):
            found.append((hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest(), path, size))
    chosen, total = [], 0
    for _, path, size in sorted(found):
        if total + size > max_bytes:
            break
        chosen.append(path)
        total += size
    return chosen, total


def _sources(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield the Python files below a folder, and their sizes. Symbolic links are left out: they may lead anywhere."""
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names if name.endswith(".py")):
            info = path.lstat()
            if stat.S_ISREG(info.st_mode) and 0 < info.st_size <= LARGEST_FILE:
                yield path, info.st_size
