"""The bytes that `bench.demo.language` trains on: the Python sources of the machine's site-packages."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.demo.model import standard_library

LARGEST_FILE = 1 << 20
"""Bytes of a file beyond which it is taken for a table rather than code."""

LEAST = 16 << 20
"""Bytes that site-packages must hold; where there are fewer, the standard library takes their place."""

HELD_OUT = 26
"""Of 256 files about this many are held out: one in ten."""


class Corpus(NamedTuple):
    """Bytes to train on and bytes held out, both uint8 on one device."""

    train: Tensor
    held_out: Tensor
    source: str
    num_files: int | None
    """None where the files were not counted."""

    def to(self, device: torch.device) -> Corpus:
        return self._replace(train=self.train.to(device), held_out=self.held_out.to(device))


class Source(NamedTuple):
    """A file, its path below the folder it was found in, and its size in bytes."""

    path: Path
    name: str
    size: int

    def rank(self) -> bytes:
        """Return a digest of the name. Files are read in its order, so that a limit on bytes takes a fair share of
        every package instead of the first letters of the alphabet."""
        return hashlib.sha256(self.name.encode()).digest()


def site_packages() -> list[Path]:
    """Return the folders of installed packages that this Python imports from."""
    folders = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return [*dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir())]


def sources(folders: Iterable[Path]) -> list[Source]:
    """List all Python files of some size below the folders."""
    found = []
    for folder in folders:
        for entry in _files(folder):
            size = entry.stat().st_size
            if 0 < size <= LARGEST_FILE:
                found.append(Source(Path(entry.path), Path(entry.path).relative_to(folder).as_posix(), size))
    return found


def _files(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """Yield the Python files below a folder. Symbolic links are left out: they may lead anywhere."""
    try:
        entries = [*os.scandir(folder)]
    except OSError:  # a folder that is not for us to read
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(entry.path)
        elif entry.name.endswith(".py") and entry.is_file(follow_symlinks=False):
            yield entry


def choose(files: Iterable[Source], max_bytes: int) -> list[Source]:
    """Return files in the order of their ranks until `max_bytes` are reached."""
    chosen, total = [], 0
    for file in sorted(files, key=Source.rank):
        total += file.size
        if total > max_bytes:
            break
        chosen.append(file)
    return chosen


def split(contents: Iterable[bytes]) -> tuple[bytearray, bytearray, int]:
    """Put whole files on the train side or the held-out side by a hash of what they hold; also return their number.

    The hash is taken of the content and not of the path, so that copies of a file (vendored packages) are on the same
    side; a second copy is left out.
    """
    sides, seen = (bytearray(), bytearray()), set()
    for content in contents:
        digest = hashlib.sha256(content).digest()
        if digest not in seen:
            seen.add(digest)
            sides[digest[0] < HELD_OUT].extend(content)
    return *sides, len(seen)


def read_corpus(max_bytes: int, folders: Sequence[Path] | None = None) -> Corpus:
    """Read at most `max_bytes` of the sources in site-packages, or the standard library where these hold little.

    The result depends on the files alone: neither on the order in which the file system lists them nor on threads.
    """
    files = choose(sources(site_packages() if folders is None else folders), max_bytes)
    if sum(file.size for file in files) < min(LEAST, max_bytes // 2):
        train, held_out = standard_library()
        return Corpus(train[:max_bytes], held_out[:max_bytes], "the standard library", None)
    with ThreadPoolExecutor(8) as pool:  # reading waits for the disk
        train, held_out, count = split(pool.map(lambda file: file.path.read_bytes(), files))
    bytes_ = (torch.frombuffer(side, dtype=torch.uint8) for side in (train, held_out))
    return Corpus(*bytes_, "site-packages", count)
