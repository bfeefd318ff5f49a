"""Run the cases of `tests.tools.compare_versions` with the version of the package that is on the path.

    python tests/tools/version_worker OUTPUT [--checkpoints RESULTS]

This folder is run by its path, so it also works with versions that do not contain it. It uses only stable interfaces
of the package: public names, the operators `torch.ops.rootfree` and environment variables. ROOTFREE_BACKEND sets the
backend. RESULTS is the output of another version, with checkpoints to resume from.
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
    """Record the schemas of all public operators and of the registered private ones."""
    with results.case("schemas of rootfree") as entries:
        for name in OPERATORS:
            entries[name] = str(getattr(torch.ops.rootfree, name).default._schema)
    with results.case("schemas of rootfree_native") as entries:
        for full in sorted(torch._C._dispatch_get_all_op_names()):
            namespace, _, name = full.partition("::")
            if namespace == "rootfree_native":
                entries[name] = str(getattr(torch.ops.rootfree_native, name).default._schema)


def foreign_modules() -> list[str]:
    """Return the modules of the package that were imported from another tree than the package itself."""
    tree = Path(rootfree_kernels.__file__).resolve().parent.parent
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "rootfree_kernels"}
    files = {name: getattr(module, "__file__", None) for name, module in modules.items()}
    return [name for name, file in files.items() if file and tree not in Path(file).resolve().parents]


def work(backend: str, others: dict[str, str] | None) -> Results:
    """Run all cases. `others` are checkpoints of another version to resume from."""
    results = Results()
    schemas(results)
    diagonal_calls.run(results, backend)
    for name in (backend, "triton_bmm") if backend == "triton" else (backend,):
        kron_calls.run(results, name)
    training.run_all(results, backend)
    if backend != "triton":  # they are slow there, and errors do not depend on the backend
        mistakes.run_all(results)
    checkpoints.run_all(results, backend, others)
    return results


def outcome(backend: str, others: dict[str, str] | None) -> dict[str, Any]:
    """Return the output: a description of the machine, and the results or the reason why there are none."""
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
    """Parse the arguments, run all cases and write the output."""
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
