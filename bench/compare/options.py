"""The command line of `bench.compare`: which optimizers and workloads it chooses here, and why it cannot."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from bench.common.optimizers import ENTRIES, Entry
from bench.common.workloads import WORKLOADS, Workload
from bench.compare.plans import TINY_WORKLOADS

SECTIONS = ("steps", "training", "scaling")


def pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def parse_arguments(arguments: Sequence[str], description: str) -> argparse.Namespace:
    """The options, `device` and `all` as they come out here."""
    parser = argparse.ArgumentParser(description=description)
    names = {"type": pattern, "default": "", "metavar": "PATTERN"}
    parser.add_argument("--only", **names, help="workloads in whose name this occurs")
    parser.add_argument("--optimizers", **names, help="optimizers in whose name this occurs")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="default: all")
    parser.add_argument("--all", action="store_true", help="on a CPU too, every optimizer and workload")
    parser.add_argument("--seconds", type=float, default=540, help="after these nothing is begun; default %(default)s")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where PyTorch sees a GPU")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default bench/results/<device>-<date>")
    parser.add_argument("--page", type=Path, metavar="FOLDER", help="draw page and plots of a record again, and stop")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for the tests
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # for processes that bench.compare starts
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.all |= options.device == "cuda"
    if problem := why_not(options):
        parser.error(problem)
    return options


def why_not(options: argparse.Namespace) -> str | None:
    """Why nothing can be measured, or None."""
    if options.page:
        here = (options.page / "results.json").is_file()
        return (
            None
            if here
            else f"--page {options.page}: no results.json is in it. Name a folder that bench.compare wrote."
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        return f"--device cuda: torch {torch.__version__} sees no GPU here. Use --device cpu."
    hint = "" if options.all else " on a CPU, where --all adds others"
    if not chosen_entries(options):
        return f"--optimizers {options.optimizers.pattern!r}: no optimizer is called so{hint}."
    if "steps" in options.sections and not chosen_workloads(options):
        return f"--only {options.only.pattern!r}: no workload is called so{hint}."
    return None


def chosen_entries(options: argparse.Namespace) -> list[Entry]:
    named = [entry for entry in ENTRIES.values() if options.optimizers.search(entry.name)]
    return [entry for entry in named if options.device in entry.devices and (options.all or entry.on_cpu)]


def chosen_workloads(options: argparse.Namespace) -> list[Workload]:
    known: Iterable[Workload] = TINY_WORKLOADS if options.tiny else WORKLOADS.values()
    named = [workload for workload in known if options.only.search(workload.name)]
    chosen = [workload for workload in named if options.all or workload.on_cpu or options.tiny]
    return sorted(chosen, key=lambda workload: workload.name != "GPT-2 124M")  # the most wanted first
