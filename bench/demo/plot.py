"""Draw the held-out losses of a record of the demo.

python -m bench.demo.plot bench/results/demo-2026-11-28.json [--axis seconds|steps] [--out FILE.png]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.demo.methods import METHODS


class Style(NamedTuple):
    """How the line of a method looks. Ours are thicker and lie above the others."""

    color: str
    marker: str
    width: float = 1.6


# The colours are Okabe's and Ito's, which colour-blind readers can tell apart.
STYLES = {
    "adamw": Style("#000000", "s"),
    "muon": Style("#E69F00", "^"),
    "shampoo": Style("#009E73", "D"),
    "soap": Style("#CC79A7", "v"),
    "rfrmsprop": Style("#56B4E9", "o", 2.4),
    "ifshampoo": Style("#0072B2", "o", 2.4),
    "recipe": Style("#D55E00", "o", 3.2),
}
OTHER = Style("#777777", "x")
LABELS = {"seconds": "seconds of training", "steps": "steps"}


def curves_of(record: Mapping[str, Any]) -> dict[str, list[tuple[int, float, float]]]:
    """Return (step, seconds, held-out loss) of every evaluation by method, the method with the highest last loss first.

    Raises:
        ValueError: the record has no evaluations on the way.
    """
    results = record.get("results", {})
    curves = {method: result["held_out"] for method, result in results.items() if result.get("held_out")}
    if not curves:
        raise ValueError("the record has no held-out losses over time; take one that bench.demo has written lately")
    return dict(sorted(curves.items(), key=lambda curve: -curve[1][-1][2]))


def draw(record: Mapping[str, Any], path: Path, axis: str = "seconds") -> None:
    """Draw held-out loss against seconds or against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for method, points in curves_of(record).items():
        steps, seconds, losses = zip(*points, strict=True)
        title = METHODS[method].title if method in METHODS else method
        color, marker, width = STYLES.get(method, OTHER)
        label, x = f"{title}: {losses[-1]:.3f}", seconds if axis == "seconds" else steps
        axes.plot(x, losses, color=color, marker=marker, markersize=5, linewidth=width, zorder=2 + width, label=label)
    axes.set_xlabel(LABELS[axis], fontsize=11)
    axes.set_ylabel("held-out loss, nats per byte", fontsize=11)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=10.5, title="loss at the end", alignment="left")
    figure.savefig(path, dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="the summary.json of a run, or a record in bench/results")
    parser.add_argument("--axis", choices=LABELS, default="seconds", help="default seconds")
    parser.add_argument("--out", type=Path, help="default: beside the record, with the ending .png")
    options = parser.parse_args()
    out = options.out or options.record.with_suffix(".png")
    try:
        draw(json.loads(options.record.read_text(encoding="utf-8")), out, options.axis)
    except ValueError as problem:
        parser.error(f"{options.record}: {problem}")
    print(f"Wrote {out}")


if __name__ == "__main__":
    main()
