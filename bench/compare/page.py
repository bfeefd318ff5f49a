"""The page of a run: its measurements and targets in Markdown, and its plots.

The first lines name the machine, the versions and the commit. Times are medians with the 10th and the 90th percentile,
and every ratio of steps is of contestants that took turns in one round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.common.optimizers import ENTRIES, WHOLE
from bench.common.report import number, table
from bench.compare import plots
from bench.compare.contest import OTHER, UPDATE, mean_step
from bench.compare.scaling import exponent, theory
from bench.compare.targets import DEFAULT, FP32, LEAST, META, Record, Row, measured_rows, pick, targets
from bench.compare.training import BASELINE

PERIODS = (1, 2, 10, 100)


def write(record: Record, folder: Path) -> None:
    """Write the page of a record, README.md, and its plots."""
    record["plots"] = plots.draw_all(record, folder)
    (folder / "README.md").write_text(markdown(record), encoding="utf-8")


def markdown(record: Record) -> str:
    sections = [head_lines(record), target_lines(record), plot_lines(record), memory_lines(record), ["## Steps"]]
    sections += [step_lines(record, name) for name in dict.fromkeys(row["workload"] for row in record["steps"])]
    sections += [training_lines(record), scaling_lines(record), error_lines(record), peer_lines(record)]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def ms(microseconds: float) -> str:
    return number(microseconds / 1e3)


def spread(timing: Row) -> str:
    """Return a time in ms: median (10th–90th percentile)."""
    text = f"{ms(timing['median'])} ({ms(timing['p10'])}–{ms(timing['p90'])})"
    return text if timing["queued"] else f"{text}*"


def block_name(block: int) -> str:
    return "whole" if block >= WHOLE else str(block)


def bullets(texts: Iterable[str]) -> list[str]:
    """Return a list of the first 300 characters of each text, after an empty line; nothing if there are no texts."""
    lines = dict.fromkeys(f"- {' '.join(text.split())[:300]}" for text in texts)
    return ["", *lines] if lines else []


def counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def kinds_of(optimizer: str) -> tuple[str, ...]:
    """Return the kinds of steps that differ."""
    return (UPDATE, OTHER) if ENTRIES[optimizer].has_period else (UPDATE,)


# ---- head and targets --------------------------------------------------------------------------------------------


def head_lines(record: Record) -> list[str]:
    roof = record["roofline"]
    figures = "ceilings not measured"
    if roof:
        copy, fp32, bf16 = (number(roof[name] / 1e9) for name in ("bandwidth", "fp32", "bf16"))
        figures = f"copy {copy} GB/s (read and written), product {fp32} GFLOP/s FP32, {bf16} GFLOP/s BF16"
    versions = ", ".join(f"{name} {record[name]}" for name in ("torch", "triton", "cuda", "python") if record.get(name))
    on_gpu = record["device_type"] == "cuda"
    threads = counted(record["threads"], "thread", "threads")
    lines = [
        f"# Side by side: {record['device'] if on_gpu else record['processor'] + ', ' + threads}",
        "",
        f"{figures}. {versions}. Commit {record['commit']}, {record['date']}, `{record['command']}`, "
        f"{record['seconds']:.0f} s.",
        "",
        "Optimizers step the same matrices with the same gradients and take turns, step by step. Fresh gradients are "
        "copied in before each step.",
        "",
        "- Block: the longest side, – where nothing is cut.",
        "- Times: ms, median (10th–90th percentile). An asterisk marks times that include gaps of the host.",
        "- T = 1, 2, …: the mean step where every T-th one updates the factors (or, theirs, takes the roots).",
        "- × ours: time at T = 10 over that of IFShampoo with BF16 / FP32 factors and the same blocks (1024 for "
        "optimizers without blocks).",
        "- State, peak: bytes a weight that are kept between steps, and the most that were allocated at once, both "
        "without weights and gradients.",
        f"- Launches: {'kernels, copies and fills' if on_gpu else 'operators of PyTorch'}, update / other.",
        "- Of roofline: the least time by the figures above over the measured one, update / other; above 1 where the "
        "data stays in a cache.",
    ]
    if record.get("muon_is_fp32"):
        lines.append("- Muon of torch iterates in FP32 instead of BF16, which this CPU multiplies slowly.")
    return lines


def target_lines(record: Record) -> list[str]:
    rows = []
    for statement, figure, target in targets(record):
        shown = "–" if figure is None else f"{figure:.3f}" if figure < 100 else number(figure)
        met = target is None or target.is_met(figure)
        verdict = "not measured" if figure is None else "**missed**" if not met else "met" if target else ""
        rows.append((statement, shown, str(target or "none"), verdict))
    return ["## Targets", "", *table(("what", "measured", "target", ""), rows)]


def plot_lines(record: Record) -> list[str]:
    return [f"![{title}]({name})" for name, title in record["plots"].items()]


# ---- steps -------------------------------------------------------------------------------------------------------


def step_lines(record: Record, workload: str) -> list[str]:
    """Return the table of a workload, fastest at T = 10 first, and the errors."""
    rows = sorted(measured_rows(record, workload), key=lambda row: mean_step(row, 10))
    failed = [row for row in record["steps"] if row["workload"] == workload and "error" in row]
    columns = ["optimizer", "block", "update, ms", "other step, ms", *(f"T = {period}" for period in PERIODS)]
    columns += ["T = 10, × ours", "state, B", "peak, B", "launches", "of roofline"]
    columns += ["host, µs"] if record["device_type"] == "cuda" else []
    lines = [f"### {workload}", "", _of_workload(record, workload)]
    lines += ["", *table(columns, [_step_cells(record, workload, row) for row in rows])] if rows else []
    return lines + bullets(f"{row['optimizer']}, {block_name(row['block'])}: {row['error']}" for row in failed)


def _of_workload(record: Record, workload: str) -> str:
    about = record["workloads"][workload]
    rounds = len({row["round"] for row in record["steps"] if row["workload"] == workload})
    text = f"{counted(about['num_matrices'], 'matrix', 'matrices')}, {about['num_weights']:,} weights."
    if rounds > 1:
        text += f" {rounds} rounds of what fits into the memory: × ours is to the {DEFAULT} of the same round."
    return text


def _step_cells(record: Record, workload: str, row: Row) -> list[str]:
    entry, kinds = ENTRIES[row["optimizer"]], kinds_of(row["optimizer"])
    fractions = [row.get(f"roofline of {kind}") for kind in kinds]
    cells = [
        f"**{entry.name}**" if entry.is_ours else entry.name,
        "–" if row["uncut"] else block_name(row["block"]),
        spread(row[UPDATE]),
        spread(row[OTHER]) if entry.has_period else "the same",
        *(ms(mean_step(row, period)) for period in PERIODS),
        _of_ours(record, workload, row),
        f"{row['state_bytes']:.2f}",
        number(row["peak_bytes"]),
        " / ".join(str(row[f"launches of {kind}"]) for kind in kinds),
        " / ".join(f"{x:.2f}" if x is not None else "–" for x in fractions) if any(fractions) else "–",
    ]
    return [*cells, number(row[f"host of {UPDATE}"])] if record["device_type"] == "cuda" else cells


def _of_ours(record: Record, workload: str, row: Row) -> str:
    """Return the time at T = 10 over that of IFShampoo with the same blocks, with BF16 and with FP32 factors."""
    block = 1024 if ENTRIES[row["optimizer"]].family == "diagonal" else row["block"]
    ours = [pick(record, workload, name, block, row["round"]) for name in (DEFAULT, FP32)]
    return " / ".join("–" if x is None else f"{mean_step(row, 10) / mean_step(x, 10):.2f}" for x in ours)


# ---- the other sections ------------------------------------------------------------------------------------------


def memory_lines(record: Record) -> list[str]:
    """Return the state and times of the memory-saving setting and of others, on the square weight."""
    rows = []
    for name in (DEFAULT, LEAST, FP32, f"{META}, eigh, packed", f"{META}, eigh, unpacked", "sirfshampoo"):
        if row := pick(record, "1024²", name, 1024):
            at_one = row.get("state_bytes at T = 1", row["state_bytes"])
            times = (ms(row[UPDATE]["median"]), ms(row[OTHER]["median"]))
            rows.append((name, f"{at_one:.3f}", f"{row['state_bytes']:.3f}", *times))
    columns = ("optimizer", "state at T = 1, B", "state at T > 1, B", "update, ms", "other step, ms")
    text = (
        "Bytes a weight of a 1024² block, momentum included. IFShampoo keeps CCᵀ and KKᵀ where T is not 1, which is "
        "the difference between its columns. With the least memory it keeps m_C and m_K as one triangle each, the "
        "momentum in BF16, and no CCᵀ and KKᵀ."
    )
    return ["## Memory", "", text, "", *table(columns, rows)] if rows else []


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
        f"{record['training'][0]['task']}, forward, backward and step, random tokens; means over whole cycles of T, "
        "which is 1 where none is named. Second-order optimizers step the matrices of the layers. Embeddings and "
        "vectors take AdamW beside theirs, the diagonal step beside ours."
    )
    if record["device_type"] == "cuda":
        text += " One trains after the other, so that the memory is its own."
    failed = bullets(f"{row['optimizer']}: {row['error']}" for row in record["training"] if "error" in row)
    return ["## Training steps", "", text, *(["", *table(columns, cells)] if cells else []), *failed]


def scaling_lines(record: Record) -> list[str]:
    lines = []
    for of, title in (("width", "one n × n weight, n ="), ("layers", "layers of one shape, number =")):
        if rows := record["scaling"].get(of):
            sizes = sorted({row["size"] for row in rows})
            cells = [_scaling_cells(rows, name, of, sizes) for name in dict.fromkeys(row["optimizer"] for row in rows)]
            columns = (f"update, ms; {title}", *map(str, sizes), "exponent (theory): update", "other step")
            lines += ["", f"### By {of}", "", *table(columns, cells)]
            lines += bullets(f"{row['optimizer']}, {row['size']}: {row['error']}" for row in rows if "error" in row)
    if rows := record["scaling"].get("T"):
        text = "IFShampoo's mean step at T, ms, and (update + (T−1)·other)/T of the steps of the largest T."
        times = [(str(row["T"]), row["measured"], row["formula"]) for row in rows]
        cells = [[T, spread(found), ms(formula), f"{found['median'] / formula:.2f}"] for T, found, formula in times]
        lines += ["", "### By T", "", text, "", *table(("T", "measured", "formula", "ratio"), cells)]
    return ["## Scaling", *lines] if lines else []


def _scaling_cells(rows: list[Row], name: str, of: str, sizes: Sequence[int]) -> list[str]:
    times = {row["size"]: ms(row[UPDATE]["median"]) for row in rows if row["optimizer"] == name and UPDATE in row}
    slopes = []
    for kind in kinds_of(name):
        slope = exponent(rows, name, kind)
        slopes.append("–" if slope is None else f"{slope:.2f} ({theory(name, kind, of):g})")
    return [name, *(times.get(size, "–") for size in sizes), *slopes, *["the same"] * (2 - len(slopes))]


def error_lines(record: Record) -> list[str]:
    """Return the pieces of the run that could not be measured at all."""
    lines = bullets(f"{piece}: {error}" for piece, error in record["errors"].items())
    return ["## Not measured", *lines] if lines else []


def peer_lines(record: Record) -> list[str]:
    here = ", ".join(f"{title} ({version})" for title, version in record["peers"].items())
    missing = bullets(f"{title}: {why}" for title, why in record["missing"].items())
    return ["## Peers", "", f"Here: {here or 'none'}.", *missing]
