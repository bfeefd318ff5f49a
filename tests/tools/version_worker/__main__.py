"""Do the work of `tests.tools.compare_versions` with the version of the package that is on the path.

    python tests/tools/version_worker OUTPUT [--checkpoints RESULTS]

This folder is run by its path, so that a version that does not have it can be run too. It uses nothing of the package
but what stays the same: the public names, the operators `torch.ops.rootfree` and environment variables.
ROOTFREE_BACKEND names the backend. RESULTS, the output of another version, has the checkpoints to resume from.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import checkpoints
import diagonal_calls
import kron_calls
import mistakes
import torch
import training
from digests import Results

import rootfree_kernels

OPERATORS = ("rf_rmsprop", "clipped_momentum", "kron_gather", "kron_factor", "kron_step")


def schemas(results: Results) -> None:
    """Note the schemas of the operators, public and private, as far as they are registered."""
    with results.case("schemas of rootfree") as entries:
        for name in OPERATORS:
            entries[name] = str(getattr(torch.ops.rootfree, name).default._schema)
    with results.case("schemas of rootfree_native") as entries:
        for full in sorted(torch._C._dispatch_get_all_op_names()):
            namespace, _, name = full.partition("::")
            if namespace == "rootfree_native":
                entries[name] = str(getattr(torch.ops.rootfree_native, name).default._schema)


def foreign_modules() -> list[str]:
    """Return the modules of the package that come from another tree than the package itself."""
    tree = Path(rootfree_kernels.__file__).resolve().parent.parent
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "rootfree_kernels"}
    files = {name: getattr(module, "__file__", None) for name, module in modules.items()}
    return [name for name, file in files.items() if file and tree not in Path(file).resolve().parents]


def work(backend: str, others: dict[str, str] | None) -> Results:
    """Do everything, with `others` to resume from."""
    results = Results()
    schemas(results)
    diagonal_calls.run(results, backend)
    for name in (backend, "triton_bmm") if backend == "triton" else (backend,):
        kron_calls.run(results, name)
    training.run_all(results, backend)
    if backend != "triton":  # where they would take long, and say the same
        mistakes.run_all(results)
    checkpoints.run_all(results, backend, others)
    return results


def outcome(backend: str, others: dict[str, str] | None) -> dict[str, Any]:
    """Return all that is written: results, or why there are none, and what they were made with."""
    machine = (
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, python {platform.python_version()}"
    )
    if reason := training.can_run(backend):
        return {"machine": machine, "left_out": reason}
    results = vars(work(backend, others))
    if foreign := foreign_modules():
        raise SystemExit(f"modules of another tree than {rootfree_kernels.__file__}: {foreign}")
    return {"machine": machine, **results}


def main() -> None:
    """Read the arguments, work and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--checkpoints", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    others = json.loads(arguments.checkpoints.read_text()).get("checkpoints") if arguments.checkpoints else None
    arguments.output.write_text(json.dumps(outcome(os.environ["ROOTFREE_BACKEND"], others)))


if __name__ == "__main__":
    main()
