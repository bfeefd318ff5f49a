"""The command line of `bench.demo.language`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.demo.language_settings import METHODS, PUBLIC_SIZES, SIZES, make, parse_change, settings_of
from bench.demo.model import GPT, Task


def is_asked_for(arguments: Sequence[str]) -> bool:
    """Whether the options of `bench.demo` mean this model: `--size` or `--device cuda` is among them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--size", nargs="?", const="")
    parser.add_argument("--device", nargs="?", const="")
    options, _ = parser.parse_known_args(arguments)
    return options.size is not None or options.device not in (None, "cpu")


def _size(text: str) -> str:
    if text not in SIZES:
        raise argparse.ArgumentTypeError(f"no size {text!r}: choose one of {', '.join(PUBLIC_SIZES)}")
    return text


def _positive(kind: type) -> Any:
    def number(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    number.__name__ = kind.__name__  # for argparse's message about what is no number
    return number


def _change(text: str) -> tuple[str, str, Any]:
    try:
        return parse_change(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from problem


def _parser(description: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("bench.demo", description=description, formatter_class=raw, allow_abbrev=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device, help=f"default here {device}")
    parser.add_argument("--size", type=_size, default="30m", metavar="|".join(PUBLIC_SIZES), help="default 30m")
    parser.add_argument("--seconds", type=_positive(float), default=60.0, help="of training, a method; default 60")
    parser.add_argument("--steps", type=_positive(int), help="steps of every method, in the place of --seconds")
    parser.add_argument("--optimizers", nargs="+", choices=METHODS, default=[*METHODS], metavar="NAME")
    parser.add_argument("--batch", type=_positive(int), help="sequences of a batch; default 64")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of the data")
    parser.add_argument("--set", type=_change, action="append", default=[], metavar="METHOD.OPTION=VALUE")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--max-bytes", type=_positive(int), default=256 << 20, help="of sources that are read")
    parser.add_argument("--out", type=Path, default=Path("runs/language-model"))
    return parser


def parse(arguments: Sequence[str], description: str) -> tuple[argparse.Namespace, Task]:
    """Return the options, with those of --set in `changes` by method, and the task. What is wrong ends the program."""
    parser = _parser(description)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: PyTorch {torch.__version__} sees no GPU here; --device cpu trains on the CPU")
    options.optimizers = [*dict.fromkeys(options.optimizers)]
    options.changes = {}
    for method, option, value in options.set:
        if method not in options.optimizers:
            parser.error(f"--set {method}.{option}: {method} is not among --optimizers")
        options.changes.setdefault(method, {})[option] = value
    task = replace(SIZES[options.size], seed=options.seed)
    task = replace(task, batch=options.batch or task.batch)
    for method, changes in options.changes.items():
        try:  # a value that an optimizer refuses is found out now, and not after the methods before it
            make(method, GPT(SIZES["tiny"]), settings_of(method, options.size, task, changes))
        except Exception as problem:
            parser.error(f"--set for {method}: {type(problem).__name__}: {problem}")
    return options, task
