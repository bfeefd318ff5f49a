"""The page of a run of `bench.compare`: what was measured, beside its targets, in Markdown.

The first lines say on what machine, with what versions and at what commit; times are medians with the 10th and the 90th
percentile, and every ratio of steps is of contestants that took turns in one round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.common.optimizers import ENTRIES, WHOLE
from bench.common.report import Target, number
from bench.compare.contest import OTHER, UPDATE, mean_step
from bench.compare.scaling import exponent, theory
from bench.compare.targets import DEFAULT, FP32, LEAST, META, Record, Row, measured_rows, pick, targets
from bench.compare.training import BASELINE

PERIODS = (1, 2, 10, 100)


def ms(microseconds: float) -> str:
    return number(microseconds / 1e3)


def spread(timing: Row) -> str:
    """A time in ms: median (10th–90th percentile)."""
    text = f"{ms(timing['median'])} ({ms(timing['p10'])}–{ms(timing['p90'])})"
    return text if timing["queued"] else f"{text}*"


def block_name(block: int) -> str:
    return "whole" if block >= WHOLE else str(block)


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def bullets(texts: Iterable[str]) -> list[str]:
    """A list, one line a text, of which the beginning is shown."""
    lines = [f"- {' '.join(text.split())[:300]}" for text in texts]
    return [*dict.fromkeys(lines), ""] if lines else []


def counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [line(columns), line(["---"] * len(columns)), *map(line, rows), ""]


# ---- targets -----------------------------------------------------------------------------------------------------


def target_lines(record: Record) -> list[str]:
    rows = []
    for statement, figure, target in targets(record):
        shown = "–" if figure is None else f"{figure:.3f}" if figure < 100 else number(figure)
        rows.append((statement, shown, *_verdict(figure, target)))
    return ["## Targets", "", *table(("what", "measured", "target", ""), rows)]


def _verdict(figure: float | None, target: Target | None) -> tuple[str, str]:
    """Return the bound and whether it is met, as text."""
    bound = f"{target.sign} {target.bound:g}" if target else "none"
    if figure is None:
        return bound, "not measured"
    return bound, "" if target is None else "met" if target.is_met(figure) else "**missed**"


# ---- steps -------------------------------------------------------------------------------------------------------


def step_lines(record: Record, workload: str) -> list[str]:
    """A table of a workload, fastest at T = 10 first, and those without figures."""
    rows = sorted(measured_rows(record, workload), key=lambda row: mean_step(row, 10))
    failed = [row for row in record["steps"] if row["workload"] == workload and "error" in row]
    columns = ["optimizer", "block", "update, ms", "other step, ms", *(f"T = {period}" for period in PERIODS)]
    columns += ["T = 10, × ours", "state, B", "peak, B", "launches", "of roofline"]
    if record["device_type"] == "cuda":
        columns.append("host, µs")
    lines = [f"### {workload}", "", _of_workload(record, workload), ""]
    lines += table(columns, [_step_cells(record, workload, row) for row in rows]) if rows else []
    return lines + bullets(f"{row['optimizer']}, {block_name(row['block'])}: {row['error']}" for row in failed)


def _of_workload(record: Record, workload: str) -> str:
    about = record["workloads"][workload]
    rounds = len({row["round"] for row in record["steps"] if row["workload"] == workload})
    text = f"{counted(about['num_matrices'], 'matrix', 'matrices')}, {about['num_weights']:,} weights."
    if rounds > 1:
        text += f" {rounds} rounds of what fits into the memory: × ours is to the {DEFAULT} of the same round."
    return text


def _step_cells(record: Record, workload: str, row: Row) -> list[str]:
    name = f"**{row['optimizer']}**" if ENTRIES[row["optimizer"]].is_ours else row["optimizer"]
    has_period = ENTRIES[row["optimizer"]].has_period
    cells = [name, "–" if row["uncut"] else block_name(row["block"]), spread(row[UPDATE])]
    cells.append(spread(row[OTHER]) if has_period else "the same")
    cells += [ms(mean_step(row, period)) for period in PERIODS]
    cells.append(_of_ours(record, workload, row))
    cells += [f"{row['state_bytes']:.2f}", number(row["peak_bytes"])]
    launches = [row[f"launches of {kind}"] for kind in ((UPDATE, OTHER) if has_period else (UPDATE,))]
    cells += [" / ".join(map(str, launches)), _roofline(row, has_period)]
    if record["device_type"] == "cuda":
        cells.append(number(row[f"host of {UPDATE}"]))
    return cells


def _of_ours(record: Record, workload: str, row: Row) -> str:
    """The time at T = 10 over that of IFShampoo with the same blocks, BF16 factors and, where it was measured, FP32."""
    block = 1024 if ENTRIES[row["optimizer"]].family == "diagonal" else row["block"]
    found = []
    for name in (DEFAULT, FP32):
        ours = pick(record, workload, name, block, row["round"])
        found.append("–" if ours is None else f"{mean_step(row, 10) / mean_step(ours, 10):.2f}")
    return " / ".join(found)


def _roofline(row: Row, has_period: bool) -> str:
    kinds = (UPDATE, OTHER) if has_period else (UPDATE,)
    parts = [row.get(f"roofline of {kind}") for kind in kinds]
    return " / ".join("–" if part is None else f"{part:.2f}" for part in parts) if any(parts) else "–"


# ---- the other sections ------------------------------------------------------------------------------------------


def memory_lines(record: Record) -> list[str]:
    """What the memory-saving setting costs, on the square weight."""
    workload = "1024²"
    rows = []
    for name in (DEFAULT, LEAST, FP32, f"{META}, eigh, packed", f"{META}, eigh, unpacked", "sirfshampoo"):
        if row := pick(record, workload, name, 1024):
            at_one = row.get("state_bytes at T = 1", row["state_bytes"])
            times = (ms(row[UPDATE]["median"]), ms(row[OTHER]["median"]))
            rows.append((name, f"{at_one:.3f}", f"{row['state_bytes']:.3f}", *times))
    if not rows:
        return []
    columns = ("optimizer", "state at T = 1, B", "state at T > 1, B", "update, ms", "other step, ms")
    text = (
        f"Bytes a weight of a {workload} block, momentum included. IFShampoo keeps CCᵀ and KKᵀ where T is not 1, which "
        "is the difference between its columns; with the least memory, m_C and m_K are kept as one triangle each, the "
        "momentum in BF16, and CCᵀ and KKᵀ not at all."
    )
    return ["## Memory", "", text, "", *table(columns, rows)]


def training_lines(record: Record) -> list[str]:
    if not record["training"]:
        return []
    rows = [row for row in record["training"] if "mean" in row]
    base = next((row["mean"] for row in rows if row["optimizer"] == BASELINE), None)
    cells = [
        (
            row["optimizer"],
            ms(row["mean"]),
            "–" if base is None else f"{row['mean'] / base:.3f}",
            f"{row['optimizer_share']:.1%}",
            number(row["tokens_per_second"]),
            f"{row['state_bytes'] / 1e6:,.1f}",
            f"{row['peak_bytes'] / 1e6:,.0f}",
        )
        for row in rows
    ]
    columns = ("optimizer", "step, ms", "× AdamW", "in the optimizer", "tokens/s", "state, MB", "peak, MB")
    text = (
        f"{record['training'][0]['task']}, forward, backward and step, random tokens; means over whole cycles of T. "
        "Second-order optimizers step the matrices of the layers; embeddings and vectors take AdamW beside theirs, the "
        "diagonal step beside ours. T is 1 where no other is named."
    )
    if record["device_type"] == "cuda":
        text += " One trains after the other, so that the memory is its own."
    failed = bullets(f"{row['optimizer']}: {row['error']}" for row in record["training"] if "error" in row)
    return ["## Training steps", "", text, "", *(table(columns, cells) if cells else []), *failed]


def scaling_lines(record: Record) -> list[str]:
    lines = []
    for of, title in (("width", "one n × n weight, n ="), ("layers", "layers of one shape, number =")):
        if rows := record.get("scaling", {}).get(of):
            sizes = sorted({row["size"] for row in rows})
            cells = [_scaling_cells(rows, name, of, sizes) for name in dict.fromkeys(row["optimizer"] for row in rows)]
            columns = (f"update, ms; {title}", *map(str, sizes), "exponent (theory): update", "other step")
            lines += [f"### By {of}", "", *table(columns, cells)]
            lines += bullets(f"{row['optimizer']}, {row['size']}: {row['error']}" for row in rows if "error" in row)
    if rows := record.get("scaling", {}).get("T"):
        cells = [(str(r["T"]), spread(r["measured"]), ms(r["formula"]), _ratio(r)) for r in rows]
        text = "IFShampoo's mean step at T, ms, and (update + (T−1)·other)/T of the steps of the largest T."
        lines += ["### By T", "", text, "", *table(("T", "measured", "formula", "ratio"), cells)]
    return ["## Scaling", "", *lines] if lines else []


def _ratio(row: Row) -> str:
    return f"{row['measured']['median'] / row['formula']:.2f}"


def _scaling_cells(rows: list[Row], name: str, of: str, sizes: Sequence[int]) -> list[str]:
    times = {row["size"]: ms(row[UPDATE]["median"]) for row in rows if row["optimizer"] == name and UPDATE in row}
    cells = [name, *(times.get(size, "–") for size in sizes)]
    kinds = (UPDATE, OTHER) if ENTRIES[name].has_period else (UPDATE,)
    for kind in kinds:
        slope = exponent(rows, name, kind)
        cells.append("–" if slope is None else f"{slope:.2f} ({theory(name, kind, of):g})")
    return cells + ["the same"] * (2 - len(kinds))


def head_lines(record: Record) -> list[str]:
    roof = record["roofline"]
    figures = (
        f"copy {roof['bandwidth'] / 1e9:,.1f} GB/s (read and written), product {roof['fp32'] / 1e9:,.0f} GFLOP/s FP32, "
        f"{roof['bf16'] / 1e9:,.0f} GFLOP/s BF16"
        if roof
        else "ceilings not measured"
    )
    versions = ", ".join(f"{name} {record[name]}" for name in ("torch", "triton", "cuda", "python") if record.get(name))
    threads = counted(record["threads"], "thread", "threads")
    on_gpu = record["device_type"] == "cuda"
    machine = record["device"] if on_gpu else f"{record['processor']}, {threads}"
    return [
        f"# Side by side: {machine}",
        "",
        f"{figures}. {versions}. Commit {record['commit']}, {record['date']}, `{record['command']}`, "
        f"{record['seconds']:.0f} s.",
        "",
        "Optimizers step the same matrices with the same gradients and take turns, step by step; fresh gradients are "
        "copied in before each.",
        "",
        "- Block: the longest side, – where nothing is cut.",
        "- Times: ms, median (10th–90th percentile); with an asterisk, gaps of the host are in them.",
        "- T = 1, 2, …: the mean step where every T-th one updates the factors (or, theirs, takes the roots).",
        "- × ours: time at T = 10 over that of IFShampoo with BF16 / FP32 factors, the blocks being the same, or of "
        "1024 where there are none.",
        "- State, peak: bytes a weight that are kept, and that were taken at most, without weights and gradients.",
        f"- Launches: {'kernels, copies and fills' if on_gpu else 'operators of PyTorch'}, update / other.",
        "- Of roofline: the least time by the figures above over the measured one, update / other; above 1 where the "
        "data stays in a cache.",
        *(
            ["- Muon of torch iterates in FP32 here, since this CPU multiplies BF16 slowly."]
            * bool(record.get("muon_is_fp32"))
        ),
        "",
    ]


def missing_lines(record: Record) -> list[str]:
    here = ", ".join(f"{title} ({version})" for title, version in record["peers"].items())
    missing = bullets(f"{title}: {why}" for title, why in record["missing"].items())
    return ["## Peers", "", f"Here: {here or 'none'}.", "", *missing]


def error_lines(record: Record) -> list[str]:
    """Pieces of the run that could not be measured at all."""
    lines = bullets(f"{piece}: {error}" for piece, error in record["errors"].items())
    return ["## Not measured", "", *lines] if lines else []


def plot_lines(record: Record) -> list[str]:
    return [*(f"![{title}]({name})" for name, title in record["plots"].items()), ""] if record["plots"] else []


def markdown(record: Record) -> str:
    lines = [*head_lines(record), *target_lines(record), *plot_lines(record), *memory_lines(record), "## Steps", ""]
    for workload in dict.fromkeys(row["workload"] for row in record["steps"]):
        lines += step_lines(record, workload)
    lines += [*training_lines(record), *scaling_lines(record), *error_lines(record), *missing_lines(record)]
    return "\n".join(lines).rstrip() + "\n"
