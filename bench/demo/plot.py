"""Draw the held-out losses of a record of the demo.

python -m bench.demo.plot bench/results/demo-2026-11-28.json [--axis seconds|steps] [--out FILE.png]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.demo.methods import METHODS

# Colour, marker and width. The colours are Okabe's and Ito's, which colour-blind readers can tell apart. Our lines are
# thicker than others and lie above them.
STYLES = {
    "adamw": ("#000000", "s", 1.6),
    "muon": ("#E69F00", "^", 1.6),
    "shampoo": ("#009E73", "D", 1.6),
    "rfrmsprop": ("#CC79A7", "o", 2.4),
    "ifshampoo": ("#56B4E9", "o", 2.4),
    "recipe": ("#0072B2", "o", 3.2),
}
OTHER = ("#777777", "x", 1.6)
LABELS = {"seconds": "seconds of training", "steps": "steps"}


def points_of(result: Mapping[str, Any]) -> list[tuple[int, float, float]]:
    """Return the evaluations of a result. Some older records have them as objects."""
    objects = result.get("evaluations", ())
    return result.get("held_out") or [(x["step"], x["seconds"], x["held_out_loss"]) for x in objects]


def curves_of(record: Mapping[str, Any]) -> dict[str, list[tuple[int, float, float]]]:
    """Return (step, seconds, held-out loss) of every evaluation by method, the method with the highest last loss first.

    Raises:
        ValueError: the record has no evaluations on the way.
    """
    results = record.get("results", {})
    curves = {method: points for method, result in results.items() if (points := points_of(result))}
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
