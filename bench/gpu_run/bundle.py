"""Prepare on a machine without a GPU what one with a GPU cannot fetch or should not spend its time on.

    python -m bench.gpu_run.bundle [--peers FOLDER]      (`make gpu-bundle` makes an environment for it first)

Writes .gpu-bundle/: the compiled extension, Triton's cache with every kernel that a run launches, checkouts of other
people's optimizers and the packages they need, and the commit. Python, PyTorch and Triton of the environment must be
those of the GPU machine. `python -m bench.gpu_run` finds the bundle there and unpacks it. Make it again after a change
in triton_kernels/, csrc/ or setup.py: line numbers are part of Triton's keys.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from bench.common.paths import ROOT, link_kernels
from bench.common.peers import CHECKOUTS, COMMIT, PEERS
from bench.common.record import commit, write_json
from bench.gpu_run.stages import HUGE
from rootfree_kernels.native import build_record

BUNDLE = ROOT / ".gpu-bundle"
ABOUT, CACHE, OTHERS, PACKAGES = "about.json", "triton-cache.tgz", "peers.tgz", "packages.tgz"
FAKE_GPU = ROOT / "tests" / "fake_gpu"

LAUNCHING_TESTS = ("tests/triton", "tests/optim/test_on_triton.py", "tests/optim/test_launches.py")
"""Tests of Triton kernels, whose launches are compiled as well."""

ON_FAKE_GPU = ("pytest", "-p", "tests.fake_gpu.plugin", "-p", "no:cacheprovider", "-m", "gpu", "-k", f"not {HUGE}")
OURS = (["bench.gpu_run.warm_cache"], [*ON_FAKE_GPU, "-q", "--tb=no", *LAUNCHING_TESTS])
THEIRS = (["bench.gpu_run.warm_cache", "--peers"],)
"""The modules that compile the kernels of this library, and those of peers."""


# ---- the parts -----------------------------------------------------------------------------------------------------


def extension() -> list[Path]:
    """Return the paths of the compiled extension of this Python and of the record of its build.

    Raises:
        SystemExit: the extension is missing, or has no CUDA part.
    """
    if reason := build_record()["left_out"]["cuda"]:
        raise SystemExit(f"✗ the extension has no CUDA part: {reason}. Install it with ROOTFREE_BUILD=cuda.")
    package, tag = ROOT / "rootfree_kernels", python_tag()
    return [package / f"_C{tag}", package / f"_build{tag.rpartition('.')[0]}.json"]  # not those of another Python


def python_tag() -> str:
    """Return the ending of this Python's compiled modules."""
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def fill_cache(cache: Path, modules: Sequence[Sequence[str]]) -> int:
    """Run modules on the fake GPU, and return how many kernels Triton's cache holds then."""
    settings = {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1", "OMP_NUM_THREADS": "1"}
    for module in modules:
        command = [sys.executable, str(FAKE_GPU), "python", "-m", *module]
        run = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True)
        if run.returncode:
            print(f"✗ {' '.join(module)} failed:\n{run.stdout[-3000:]}{run.stderr[-1000:]}", flush=True)
    return len([*cache.rglob("*.cubin")])


def copy_peers(source: Path, folder: Path) -> list[str]:
    """Copy the checkouts of peers without their history, each with a file that names its commit."""
    found = []
    for peer in PEERS.values():
        checkout = source / peer.checkout.name
        if checkout.is_dir():
            shutil.copytree(checkout, folder / checkout.name, ignore=shutil.ignore_patterns(".git", "*.png", "*.gif"))
            (folder / checkout.name / COMMIT).write_text(peer.version_of(checkout) + "\n")
            found.append(peer.title)
    return found


def download_packages(folder: Path) -> list[str]:
    """Unpack the pure Python packages that peers need beside PyTorch."""
    wanted = [name for peer in PEERS.values() for name in peer.carried]
    options = ["--disable-pip-version-check", "--quiet", "install", "--no-deps", "--no-compile"]
    command = [sys.executable, "-m", "pip", *options, "--target", str(folder), *wanted]
    return [] if subprocess.run(command).returncode else wanted


# ---- packing and unpacking -----------------------------------------------------------------------------------------


def copy_all(files: Iterable[Path], folder: Path) -> None:
    for path in files:
        shutil.copy2(path, folder)


def pack_folder(folder: Path, archive: Path) -> None:
    """Write a folder to an archive."""
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, ".")


def unpack(archive: Path, folder: Path) -> None:
    """Write an archive to a folder, in place of what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def relocate(cache: Path) -> None:
    """Write the new folder of a Triton cache into it: each group of files is listed with the paths of its folder."""
    for listing in cache.rglob("__grp__*"):
        group = json.loads(listing.read_text())
        group["child_paths"] = {name: str(listing.parent / name) for name in group["child_paths"]}
        listing.write_text(json.dumps(group))


def versions() -> dict[str, str]:
    """Return what a bundle depends on. Triton's key is a hash of its own files, and part of every key of its cache."""
    from triton.runtime.cache import triton_key

    packages = {name: version(name).partition("+")[0] for name in ("torch", "triton")}
    key = hashlib.sha256(triton_key().encode()).hexdigest()[:16]
    return {"python": python_tag(), **packages, "Triton's key": key}


def unfit(about: dict[str, str]) -> list[str]:
    """Return how this environment differs from the one that the bundle was made in."""
    here = versions()
    return [f"{name} is {here[name]}, the bundle's {about.get(name)}" for name in here if here[name] != about.get(name)]


def use(bundle: Path, scratch: Path) -> dict[str, str]:
    """Unpack a bundle, and return the variables that let processes find what it holds."""
    about = json.loads((bundle / ABOUT).read_text())
    for difference in unfit(about):
        print(f"the bundle is for another environment: {difference}", flush=True)
    copy_all([*bundle.glob("_C*"), *bundle.glob("_build*")], ROOT / "rootfree_kernels")
    link_kernels(ROOT)
    cache, packages = scratch / "triton-cache", scratch / "packages"
    unpack(bundle / CACHE, cache)
    relocate(cache)
    paths = [str(ROOT)]
    if (bundle / PACKAGES).exists():
        unpack(bundle / PACKAGES, packages)
        paths.append(str(packages))
    if not (ROOT / ".peers").exists():
        unpack(bundle / OTHERS, ROOT / ".peers")
    path = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path, "ROOTFREE_COMMIT": about["commit"]}


# ---- command line --------------------------------------------------------------------------------------------------


def make(peers: Path, bundle: Path = BUNDLE) -> None:
    """Make the bundle anew."""
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begin:5.0f} s  {text}", flush=True)

    shutil.rmtree(bundle, ignore_errors=True)
    bundle.mkdir()
    copy_all(extension(), bundle)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "peers").mkdir()
        found = copy_peers(peers, work / "peers")
        pack_folder(work / "peers", bundle / OTHERS)
        packages = download_packages(work / "packages")
        if packages:
            pack_folder(work / "packages", bundle / PACKAGES)
        say(f"peers: {', '.join(found) or f'none is in {peers}'}; packages: {', '.join(packages) or 'none'}")
        for modules in (OURS, THEIRS) if found else (OURS,):  # the bundle is whole after ours
            kernels = fill_cache(work / "cache", modules)
            pack_folder(work / "cache", bundle / CACHE)
            about = {**versions(), "commit": commit(), "kernels": kernels, "peers": found}
            write_json(bundle / ABOUT, about)
            say(f"{kernels} kernels are compiled")
    size = sum(path.stat().st_size for path in bundle.iterdir())
    say(f"{bundle.name}/ holds {size / 1e6:.1f} MB for torch {about['torch']}, triton {about['triton']}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the bundle and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", type=Path, default=CHECKOUTS, metavar="FOLDER", help="default .peers/")
    make(parser.parse_args(arguments).peers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
