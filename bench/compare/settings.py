"""The settings of a run: the command line, and what is measured on a CPU, on a GPU and in a test."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.common.gpt import GPT2
from bench.common.gpu import why_no_gpu
from bench.common.optimizers import ENTRIES, Entry
from bench.common.workloads import WORKLOADS, Workload
from bench.compare import training
from bench.compare.contest import Limits

SECTIONS = ("steps", "training", "scaling")


# ---- plans -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a machine measures, and for how long."""

    limits: Limits
    scaling_limits: Limits
    copied: int
    """FP32 numbers whose copy gives the bandwidth."""

    product: int
    """The side of the matrices whose products give the rates."""

    widths: tuple[int, ...]
    layer_counts: tuple[int, ...]
    layer_side: int
    periods: tuple[int, ...]
    period_side: int
    task: training.Task
    training_cycles: tuple[int, int]
    """Cycles of ten steps that warm up, and that are measured."""

    budget: float = 0.5
    """The part of a GPU's memory for the contestants of a round."""


CPU = Plan(
    limits=Limits(most=8, least=3, seconds=1.5, all_seconds=15.0),
    scaling_limits=Limits(most=4, least=2, seconds=0.3, all_seconds=8.0),
    copied=1 << 25,
    product=1024,
    widths=(128, 256, 512, 1024, 2048),
    layer_counts=(1, 4, 16, 96),
    layer_side=128,
    periods=(1, 2, 5, 10),
    period_side=512,
    task=training.SMALL,
    training_cycles=(2, 1),
)
GPU = Plan(
    limits=Limits(most=30, least=3, seconds=0.6, all_seconds=8.0),
    scaling_limits=Limits(most=10, least=2, seconds=0.2, all_seconds=4.0),
    copied=1 << 29,
    product=8192,
    widths=(256, 512, 1024, 2048, 4096, 8192),
    layer_counts=(1, 2, 4, 8, 16, 32, 64, 96),
    layer_side=768,
    periods=(1, 2, 5, 10, 20),
    period_side=1024,
    task=training.GPT2_124M,
    training_cycles=(2, 2),
)
TINY = Plan(
    limits=Limits(most=1, least=1, seconds=0.0),
    scaling_limits=Limits(most=1, least=1, seconds=0.0),
    copied=1 << 12,
    product=16,
    widths=(8, 16, 32),
    layer_counts=(1, 2, 3),
    layer_side=8,
    periods=(1, 2),
    period_side=16,
    task=training.Task("tiny GPT", GPT2(1, 8, 50, 4, head_width=4), batch=2, bf16=False),
    training_cycles=(1, 1),
)
TINY_WORKLOADS = (Workload("16²", ((16, 16),)), Workload("pair", ((8, 40), (24, 8))))


# ---- command line ------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str], description: str) -> argparse.Namespace:
    """Return the options, with `device` and `all` as they apply to this machine."""
    parser = argparse.ArgumentParser(description=description)
    names = {"type": _pattern, "default": "", "metavar": "PATTERN"}
    parser.add_argument("--only", **names, help="workloads whose name contains this regular expression")
    parser.add_argument("--optimizers", **names, help="optimizers whose name contains this regular expression")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="default: all")
    parser.add_argument("--all", action="store_true", help="every optimizer and workload, on a CPU too")
    parser.add_argument("--seconds", type=float, default=540, help="after these nothing begins; default %(default)s")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if PyTorch sees a GPU")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default bench/results/<device>-<date>")
    parser.add_argument("--page", type=Path, metavar="FOLDER", help="draw page and plots of a record again, and stop")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for the tests
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # for processes that bench.compare starts
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.all |= options.device == "cuda"
    if problem := _why_not(options):
        parser.error(problem)
    return options


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def _why_not(options: argparse.Namespace) -> str | None:
    """Return why nothing can be measured, or None."""
    if options.page:
        found = (options.page / "results.json").is_file()
        return None if found else f"--page {options.page} has no results.json: name a folder that bench.compare wrote."
    if options.device == "cuda" and (why := why_no_gpu()):
        return f"--device cuda: {why}. Use --device cpu."
    hint = "" if options.all else " on a CPU, where --all adds others"
    if not chosen_entries(options):
        return f"--optimizers {options.optimizers.pattern!r} matches no optimizer{hint}."
    if "steps" in options.sections and not chosen_workloads(options):
        return f"--only {options.only.pattern!r} matches no workload{hint}."
    return None


def chosen_entries(options: argparse.Namespace) -> list[Entry]:
    named = [entry for entry in ENTRIES.values() if options.optimizers.search(entry.name)]
    return [entry for entry in named if options.device in entry.devices and (options.all or entry.on_cpu)]


def chosen_workloads(options: argparse.Namespace) -> list[Workload]:
    known: Iterable[Workload] = TINY_WORKLOADS if options.tiny else WORKLOADS.values()
    named = [workload for workload in known if options.only.search(workload.name)]
    chosen = [workload for workload in named if options.all or workload.on_cpu or options.tiny]
    return sorted(chosen, key=lambda workload: workload.name != "GPT-2 124M")  # the most wanted first
