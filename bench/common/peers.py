"""Other people's optimizers: where they are found, and how to get them.

    python -m bench.common.peers            which are here
    python -m bench.common.peers --install  installs what a package index offers (`make peers`)

A checkout in .peers/ goes before an installed package. Nothing here is ever imported by the package itself.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from bench.common.paths import ROOT

CHECKOUTS = ROOT / ".peers"
CONSTRAINTS = ROOT / "constraints.txt"
COMMIT = ".commit"
"""A file in a copy of a checkout, written by `bench.gpu_run.bundle`: which commit it is."""

UNKNOWN = "a copy without its commits"


class MissingPeer(ImportError):
    """A peer is not installed; the message says how it can be."""


@dataclass(frozen=True)
class Peer:
    """A package with optimizers to compare with."""

    title: str
    module: str
    repository: str
    """On GitHub; a checkout of it is looked for in .peers/, under the repository's own name."""

    index: tuple[str, ...] = ()
    """Requirements, pinned here or in constraints.txt: the package itself, where an index offers it, and what it needs
    beside PyTorch."""

    carried: tuple[str, ...] = ()
    """Those of its requirements that a machine without network may lack: pure Python, taken along by a bundle."""

    @property
    def checkout(self) -> Path:
        return CHECKOUTS / self.repository.rpartition("/")[2]

    def how_to_install(self) -> str:
        clone = f"git clone https://github.com/{self.repository} .peers/{self.checkout.name}"
        return f"{clone}; make peers" if self.index else clone

    def version(self) -> str:
        """The commit of the checkout, or the version of the installed package; where neither is known, what it is."""
        if self.checkout.is_dir():
            return self.version_of(self.checkout)
        try:
            return importlib.metadata.version(self.module.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            return "of an unknown version"

    @staticmethod
    def version_of(checkout: Path) -> str:
        """Return the commit of a checkout, or what a file beside a copy of one says."""
        note = checkout / COMMIT
        if note.exists():
            return note.read_text(encoding="utf-8").strip()
        if not (checkout / ".git").exists():  # git would tell of the repository around it
            return UNKNOWN
        command = ["git", "-C", str(checkout), "log", "-1", "--format=%h, %as"]
        found = subprocess.run(command, capture_output=True, text=True)
        return f"git {found.stdout.strip()}" if found.returncode == 0 else UNKNOWN


SINGD = ("singd==0.0.5", "einops==0.8.2")

PEERS = {
    peer.module: peer
    for peer in (
        Peer("Meta's Distributed Shampoo", "distributed_shampoo", "facebookresearch/optimizers", ("numpy",)),
        Peer(
            "sirfshampoo, the authors' own",
            "sirfshampoo",
            "f-dangel/sirfshampoo",
            ("sirfshampoo==0.0.1", *SINGD),
            SINGD,
        ),
        Peer("SOAP, the authors' own", "soap", "nikhilvyas/SOAP"),
        Peer(
            "SOAP of pytorch_optimizer", "pytorch_optimizer", "kozistr/pytorch_optimizer", ("pytorch-optimizer==4.1.0",)
        ),
        Peer("Dion's Muon", "dion", "microsoft/dion", ("numpy",)),
    )
}


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The modules of a folder can be imported, before those that are installed."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@cache
def find(module: str) -> ModuleType:
    """Import a peer.

    Raises:
        MissingPeer: it is not here, or cannot be imported; the message says why, and how to install it.
    """
    peer = PEERS[module]
    try:
        if peer.checkout.is_dir():
            with _importable(peer.checkout):
                return import_module(module)
        return import_module(module)
    except ModuleNotFoundError as error:
        absent = "" if error.name == module else f" (it is here, and needs {error.name})"
        raise MissingPeer(f"not installed{absent}: {peer.how_to_install()}") from error
    except Exception as error:  # of any kind: a peer that is broken must not stop the others
        raise MissingPeer(f"cannot be imported: {type(error).__name__}: {error}") from error


def why_missing(module: str) -> str | None:
    """Why a peer cannot take part, or None."""
    try:
        find(module)
    except MissingPeer as error:
        return str(error)
    return None


def install() -> int:
    """pip install what an index offers, without a change of what constraints.txt pins; the exit status."""
    wanted = list(dict.fromkeys(requirement for peer in PEERS.values() for requirement in peer.index))
    options = ["--disable-pip-version-check", "--quiet", "install", "--no-deps", "-c", str(CONSTRAINTS)]
    return subprocess.run([sys.executable, "-m", "pip", *options, *wanted]).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--install", action="store_true", help="install what a package index offers")
    status = install() if parser.parse_args().install else 0
    for peer in PEERS.values():
        problem = why_missing(peer.module)
        print(f"{peer.title:30} {problem or peer.version()}")
    return status


if __name__ == "__main__":
    sys.exit(main())
