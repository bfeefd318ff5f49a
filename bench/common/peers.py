"""Other people's optimizers: where to find them and how to install them.

    python -m bench.common.peers            lists them
    python -m bench.common.peers --install  installs those of a package index (`make peers`)

A checkout in .peers/ is preferred to an installed package. The package itself never imports a peer.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from bench.common.paths import ROOT

CHECKOUTS = ROOT / ".peers"
CONSTRAINTS = ROOT / "constraints.txt"
COMMIT = ".commit"
"""The file that names the commit in a copy of a checkout. `bench.gpu_run.bundle` writes it."""

UNKNOWN = "a copy without its commits"


class MissingPeer(ImportError):
    """A peer is not installed. The message says how to install it."""


@dataclass(frozen=True)
class Peer:
    """A package with optimizers to compare with."""

    title: str
    module: str
    repository: str
    """On GitHub. Its checkout in .peers/ has the name of the repository."""

    index: tuple[str, ...] = ()
    """Requirements from a package index beside PyTorch, pinned here or in constraints.txt."""

    carried: tuple[str, ...] = ()
    """Pure Python requirements that `bench.gpu_run.bundle` takes to a machine without network."""

    @property
    def checkout(self) -> Path:
        return CHECKOUTS / self.repository.rpartition("/")[2]

    def how_to_install(self) -> str:
        clone = f"git clone https://github.com/{self.repository} .peers/{self.checkout.name}"
        return f"{clone}; make peers" if self.index else clone

    def version(self) -> str:
        """Return the commit of the checkout, or the version of the installed package."""
        if self.checkout.is_dir():
            return self.version_of(self.checkout)
        try:
            return importlib.metadata.version(self.module.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            return "of an unknown version"

    @staticmethod
    def version_of(checkout: Path) -> str:
        """Return the commit of a checkout or of a copy of one."""
        note = checkout / COMMIT
        if note.exists():
            return note.read_text(encoding="utf-8").strip()
        if not (checkout / ".git").exists():  # git would describe the repository around it
            return UNKNOWN
        command = ["git", "-C", str(checkout), "log", "-1", "--format=%h, %as"]
        found = subprocess.run(command, capture_output=True, text=True)
        return f"git {found.stdout.strip()}" if found.returncode == 0 else UNKNOWN


SINGD = ("singd==0.0.5", "einops==0.8.2")
SIRF = ("sirfshampoo==0.0.1", *SINGD)
PYTORCH_OPTIMIZER = ("pytorch-optimizer==4.1.0",)
PEERS = {
    peer.module: peer
    for peer in (
        Peer("Meta's Distributed Shampoo", "distributed_shampoo", "facebookresearch/optimizers", ("numpy",)),
        Peer("sirfshampoo, the authors' own", "sirfshampoo", "f-dangel/sirfshampoo", SIRF, SINGD),
        Peer("SOAP, the authors' own", "soap", "nikhilvyas/SOAP"),
        Peer("SOAP of pytorch_optimizer", "pytorch_optimizer", "kozistr/pytorch_optimizer", PYTORCH_OPTIMIZER),
        Peer("Dion's Muon", "dion", "microsoft/dion", ("numpy",)),
    )
}


@cache
def find(module: str) -> ModuleType:
    """Import a peer.

    Raises:
        MissingPeer: it is not here or cannot be imported. The message says why, and how to install it.
    """
    peer = PEERS[module]
    path = [str(peer.checkout), *sys.path] if peer.checkout.is_dir() else sys.path
    try:
        with patch.object(sys, "path", path):
            return import_module(module)
    except ModuleNotFoundError as error:
        absent = "" if error.name == module else f" (it is here, and needs {error.name})"
        raise MissingPeer(f"not installed{absent}: {peer.how_to_install()}") from error
    except Exception as error:  # of any kind: a peer that is broken must not stop the others
        raise MissingPeer(f"cannot be imported: {type(error).__name__}: {error}") from error


def why_missing(module: str) -> str | None:
    """Return why a peer cannot take part, or None."""
    try:
        find(module)
    except MissingPeer as error:
        return str(error)
    return None


def install() -> int:
    """Install the peers that a package index has, at the versions of constraints.txt. Return the status of pip."""
    wanted = list(dict.fromkeys(requirement for peer in PEERS.values() for requirement in peer.index))
    options = ["--disable-pip-version-check", "--quiet", "install", "--no-deps", "-c", str(CONSTRAINTS)]
    return subprocess.run([sys.executable, "-m", "pip", *options, *wanted]).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--install", action="store_true", help="install what a package index offers")
    status = install() if parser.parse_args().install else 0
    for peer in PEERS.values():
        print(f"{peer.title:30} {why_missing(peer.module) or peer.version()}")
    return status


if __name__ == "__main__":
    sys.exit(main())
