"""Steps of a run that did the same work by different backends, in the form that `bench.make_dispatch_table` reads.

Only contestants of one round are compared, since these took turns: the diagonal step of a whole workload, and the
matrices of a workload whose blocks have one shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.optim import Optimizer

from bench.common.workloads import Workload
from bench.compare.contest import OTHER, UPDATE
from rootfree_kernels.ops.dispatch import OPERATIONS
from rootfree_kernels.optim.report import step_reports

DIAGONAL = ("RFRMSProp", "RFRMSProp, CUDA", "RFRMSProp, eager")
MATRICES = ("IFShampoo", "IFShampoo, eager")
BLOCK = 1024

Row = dict[str, Any]


def backend_of(optimizer: Optimizer) -> str | None:
    """Return the backend that steps all parameters of ours; None if there are several or the optimizer is not ours."""
    names = {batch.backend.name for batches in step_reports(optimizer) for batch in batches}
    return names.pop() if len(names) == 1 else None


def alternatives(workload: Workload, rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the alternatives among the rows of a round."""
    diagonal = [row for row in rows if row["optimizer"] in DIAGONAL]
    sizes = {"numbers": workload.num_weights, "tensors": len(workload.shapes)}
    yield from _case("diagonal", sizes, workload, UPDATE, diagonal)
    blocks = workload.blocks(BLOCK)
    matrices = [row for row in rows if row["optimizer"] in MATRICES and (row["uncut"] or row["block"] == BLOCK)]
    for kind in (UPDATE, OTHER) if len(set(blocks)) == 1 else ():
        yield from _case("matrices", {"side": max(blocks[0]), "blocks": len(blocks)}, workload, kind, matrices)


def _case(operation: str, sizes: dict[str, int], workload: Workload, kind: str, rows: Sequence[Row]) -> Iterator[Row]:
    """Yield a row with the times by backend, if there are two."""
    known = OPERATIONS[operation].choices
    times = {row["backend"]: row[kind] for row in rows if kind in row and row.get("backend") in known}
    if len(times) > 1:
        found = {"operation": operation, "sizes": sizes, "times": times}
        yield {"table": "Steps", "case": f"{workload.name}, {operation}, {kind}", "alternatives": found}
