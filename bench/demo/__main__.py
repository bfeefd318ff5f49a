"""Train a byte-level GPT with several optimizers, side by side.

    python -m bench.demo [--steps N] [--seed N] [--out DIR] [--optimizers adamw ifshampoo ...]
    python -m bench.demo --device cuda --size 30m|124m --seconds 60
    python -m bench.demo --device cuda --size 30m --steps 1000 --optimizers adamw muon --set adamw.lr=2e-3

The first form trains a small model on Python's standard library, on the CPU and in less than 5 minutes on two cores.
The others train a larger model of the same kind on the Python sources in this machine's site-packages, on a GPU with
products in BF16 (autocast). About a tenth of the files is held out. Every optimizer starts from the same weights and
sees the same batches in the same order. Losses are in nats per byte.

Time and schedule. With --steps, every method takes the same number of steps, with the same schedule: a short warm-up,
then a cosine to zero. With --seconds, the number of steps is that time divided by the measured time of a step, and the
schedule goes over these steps, so that every method is judged at its end. On a GPU or with --seconds, each method takes
throw-away steps before: kernels are compiled, memory is allocated, and the time of a step is measured; then weights and
optimizer are made anew. Only the time of training counts: the clock stops for evaluations. All methods are evaluated at
multiples of the same number of steps, and the report also compares them at the last one that all have reached. A slow
method's learning rate has come down further there, which favours it, so that the report shows the factor.

Writes to --out as it goes: progress.jsonl, a line for every evaluation; after every method summary.json, README.md and,
where there is matplotlib, two plots. A method that diverges or fails (out of memory, say) is recorded, and the others
go on; the exit status is 1 where one failed.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch

from bench.common.gpu import why_no_gpu
from bench.common.memory import release
from bench.common.record import gpu, provenance
from bench.demo.data import Corpus, read_corpus, standard_library
from bench.demo.methods import METHODS, make, options_of, terms, why_unavailable
from bench.demo.report import Run, table, write_report
from bench.demo.settings import SETTINGS, SIZES, Task, settings_of
from bench.demo.train import Session, Trainee, train

SHOWN = {"small": ["adamw", "muon", "recipe"]}
"""The optimizers that are trained if none are asked for, by size; at other sizes all that have settings."""

POSITIVE = ("seconds", "steps", "batch", "length", "width", "layers", "max_bytes")
"""The options that must be above 0."""

# ---- command line ------------------------------------------------------------------------------------------------


def parse_change(text: str) -> tuple[str, str, Any]:
    """Read METHOD.OPTION=VALUE, as in `adamw.lr=1e-3`; the value is a Python literal, torch.DTYPE or a word."""
    place, _, value = text.partition("=")
    method, _, option = place.partition(".")
    if not (option and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not METHOD.OPTION=VALUE, as in adamw.lr=1e-3")
    if value.startswith("torch."):
        return method, option, getattr(torch, value[len("torch.") :], value)
    try:
        return method, option, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return method, option, value


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("bench.demo", description=__doc__, formatter_class=raw, allow_abbrev=False)
    add, names = parser.add_argument, " ".join(METHODS)
    add("--device", choices=("cuda", "cpu"), help="default cpu for size small, otherwise cuda where there is a GPU")
    sizes = [size for size in SIZES if size != "tiny"]
    add("--size", choices=sizes, help="default small; 30m with --device cuda")
    add("--tiny", dest="size", action="store_const", const="tiny", help=argparse.SUPPRESS)  # for the tests
    add("--seconds", type=float, help="of training, a method; default 60 for a size other than small")
    add("--steps", type=int, help="steps of every method, in the place of --seconds; default 400 at small")
    add(
        "--optimizers", nargs="+", choices=METHODS, metavar="NAME", help=f"of {names}; default at small the first three"
    )
    add("--seed", type=int, help="of weights and order of the data; default 0")
    add("--batch", type=int, help="sequences of a batch")
    add("--length", type=int, help="bytes of a sequence")
    add("--width", type=int, help="columns of the model")
    add("--layers", type=int, help="blocks of the model")
    add("--warmup", type=int, help="steps in which the learning rate goes up")
    add("--set", type=parse_change, action="append", default=[], metavar="METHOD.OPTION=VALUE")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--max-bytes", type=int, default=256 << 20, help="of site-packages that are read")
    add("--out", type=Path, help="default runs/demo, or runs/language-model for a size other than small")
    return parser


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Task]:
    """Return the options, with the settings of every method in `settings`, and the task. A mistake ends the program."""
    parser = _parser()
    options = parser.parse_args(arguments)
    options.size = options.size or ("30m" if options.device == "cuda" else "small")
    for name in POSITIVE:
        if (value := getattr(options, name)) is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} {value}: choose a number above 0")
    small, no_gpu = options.size == "small", why_no_gpu()
    options.device = options.device or ("cpu" if no_gpu or small else "cuda")
    if options.device == "cuda" and no_gpu:
        parser.error(f"--device cuda: {no_gpu}. Use --device cpu.")
    if not (small or options.steps or options.seconds):
        options.seconds = 60.0
    options.out = options.out or Path("runs/demo" if small else "runs/language-model")
    given = {name: value for name, value in vars(options).items() if name in asdict(Task()) and value is not None}
    task = replace(SIZES[options.size], **given)
    options.seconds = None if options.steps else options.seconds
    options.settings = _settings(parser, options, task)
    return options, task


def _settings(parser: argparse.ArgumentParser, options: argparse.Namespace, task: Task) -> dict[str, dict[str, Any]]:
    """Return the settings of every method that is asked for. What cannot be trained is found out now, and not after the
    methods before it."""
    known, changes = SETTINGS[options.size], {name: {} for name in options.optimizers or SHOWN.get(options.size, ())}
    changes = changes or {name: {} for name in known}
    for method in changes:
        if method not in known:
            parser.error(f"--optimizers {method}: no settings at size {options.size}: choose from {', '.join(known)}")
        if reason := why_unavailable(method):
            parser.error(f"--optimizers {method}: {reason}")
    for method, option, value in options.set:
        if method not in changes:
            parser.error(f"--set {method}.{option}: {method!r} is not one of --optimizers {' '.join(changes)}")
        if option not in options_of(method):
            names = ", ".join(options_of(method))
            parser.error(f"--set {method}.{option}: {method} has no option {option!r}: choose one of {names}")
        changes[method][option] = value
    settings = {method: settings_of(method, options.size, changes[method]) for method in changes}
    for method in (method for method in changes if changes[method]):
        try:
            make(method, SIZES["tiny"].model(), settings[method], task)
        except Exception as reason:
            parser.error(f"--set for {method}: {type(reason).__name__}: {reason}")
    return settings


# ---- the run -----------------------------------------------------------------------------------------------------


def logger(file: TextIO, start: float, prints: bool = True) -> Callable[[dict[str, Any]], None]:
    """Return a function that writes a line of JSON at once, and prints it."""

    def log(row: dict[str, Any]) -> None:
        file.write(json.dumps(row) + "\n")
        file.flush()
        if prints:
            figures = (
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
            print(f"{time.perf_counter() - start:7.1f} s  " + ", ".join(figures), flush=True)

    return log


@contextmanager
def progress_bar(method: str, steps: int | None) -> Iterator[Callable[[int, float], object]]:
    """Show a progress bar; yield a function that moves it to a step and shows the loss."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(f"{method:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}")) as progress:
        bar = progress.add_task(method, total=steps, loss=math.nan)
        yield lambda step, loss: progress.update(bar, completed=step, loss=loss)


def attempt(method: str, settings: dict[str, Any], session: Session, bar: bool = False, sample: bool = False) -> Run:
    """Train one method from the start, with a progress bar and a sample of text at the end if they are wanted. An error
    is recorded in the run and in the log."""
    run, steps = Run(), None if session.seconds else session.task.steps
    try:
        trainee = Trainee(method, settings, session, run)
        with progress_bar(method, steps) if bar else nullcontext(trainee.on_step) as trainee.on_step:
            train(trainee)
        if sample and run.is_complete:
            run.sample = trainee.model.cpu().sample("def ", 300, session.task.seed)
    except Exception as error:  # of any kind, out of memory too: the other methods go on
        run.error = f"{type(error).__name__}: {error}"
        session.log({"optimizer": method, "seconds": run.seconds, "error": run.error})
    trainee = None
    release()
    return run


def about(options: argparse.Namespace, task: Task, corpus: Corpus, arguments: Sequence[str]) -> dict[str, Any]:
    """Return what a record says about where it comes from."""
    planned = {"steps": None if options.seconds else task.steps, "seconds": options.seconds}
    return {
        **provenance(shlex.join(["python", "-m", "bench.demo", *arguments])),
        **gpu(torch.device(options.device)),
        "size": options.size,
        "weights": sum(x.numel() for x in task.model().parameters()),
        "task": {**asdict(task), **planned},
        "compiled": options.compile,
        "data": {"source": corpus.source, "files": corpus.num_files},
        "bytes": {"train": len(corpus.train), "held_out": len(corpus.held_out)},
        "settings": {name: {**terms(name, task), **settings} for name, settings in options.settings.items()},
    }


def main(arguments: Sequence[str]) -> int:
    """Train all methods and write what they did; return the exit status, 1 where one failed other than by diverging."""
    start = time.perf_counter()
    options, task = parse(arguments)
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    corpus = (standard_library() if options.size == "small" else read_corpus(options.max_bytes)).to(device)
    record = about(options, task, corpus, arguments)
    sizes = f"{len(corpus.train):,} bytes to train on, {len(corpus.held_out):,} held out"
    print(f"{record['weights']:,} weights; {corpus.source}: {sizes}")
    options.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, Run] = {}
    write_report(options.out, record, runs)  # so that a run which is cut short says where it comes from
    small = options.size == "small"
    bar = small and options.device == "cpu" and find_spec("rich") is not None
    with (options.out / "progress.jsonl").open("w", encoding="utf-8") as file:
        log = logger(file, start, prints=not bar)
        session = Session(task, corpus, device, options.seconds, compile=options.compile, log=log)
        for method, settings in options.settings.items():
            runs[method] = attempt(method, settings, session, bar, sample=small)
            record["wall_seconds"] = time.perf_counter() - start
            write_report(options.out, record, runs)
    print(table(runs))
    if written := {name: run for name, run in runs.items() if run.sample}:
        best = min(written, key=lambda name: written[name].held_out_loss or 0.0)
        print(f"\nwritten by the model of {best}:\n\n{written[best].sample}\n")
    print(f"Wrote summary.json, README.md and progress.jsonl to {options.out}")
    return int(any(run.error for run in runs.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
