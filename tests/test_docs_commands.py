"""The command lines of README.md, CONTRIBUTING.md and docs/: make targets, programs and their options exist.

Programs are stopped after they parsed their command line, so nothing is measured or trained.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import pytest

from tests.tools.pages import PAGES, ROOT, commands, name_of

COMMANDS = {command: name_of(page) for page in reversed(PAGES) for command in commands(page)}


class CommandLineIsRead(BaseException):
    """Raised after a program parsed its command line, to stop it."""


def stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    parse, parse_known = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args

    def parse_and_stop(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        parse(parser, *args, **kwargs)
        raise CommandLineIsRead

    def parse_known_and_stop(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        found = parse_known(parser, *args, **kwargs)
        if sys._getframe(1).f_code is parse.__code__:  # argparse's own call; unknown options are refused after it
            return found
        raise CommandLineIsRead

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_and_stop)


def source_of(module: str) -> str | None:
    """Return the source of a module, or of all files of a package. Return None if it cannot be run."""
    try:
        spec = importlib.util.find_spec(module)
        is_package = spec is not None and spec.submodule_search_locations
        spec = importlib.util.find_spec(f"{module}.__main__") if is_package else spec
    except ModuleNotFoundError:  # the parent package is missing
        return None
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin)
    return "\n".join(part.read_text("utf-8") for part in (file.parent.glob("*.py") if is_package else [file]))


def check_module(module: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a module can be run with these arguments. A module that does not parse arguments must get none."""
    source = source_of(module)
    assert source is not None, f"there is no module {module} that can be run"
    if module.partition(".")[0] not in ("bench", "tests"):
        return
    if not re.search(r"argparse|parse_arg|(?<![.\w])parse\(", source):
        assert not arguments, f"{module} takes no arguments"
        return
    stop_after_parsing(monkeypatch)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    # patch.dict restores the environment, which the compile gate changes.
    with pytest.raises(CommandLineIsRead), warnings.catch_warnings(), patch.dict(os.environ):
        warnings.simplefilter("ignore", RuntimeWarning)  # the module may have been imported before
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def check_make(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the targets, the variables, and the command lines of benchmarks that make would run."""
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    variables = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {word.partition("=")[0] for word in arguments if "=" in word} <= {*variables, "ROOTFREE_BUILD", "CXX"}
    for module, rest in re.findall(r"-m (bench[\w.]*)(.*)$", done.stdout, re.MULTILINE):
        with monkeypatch.context() as context:
            check_module(module, shlex.split(rest), context)


def test_wrong_variables_and_options_behind_make_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("BENCH_ARGS=--nosuch", "BENCH_ARG=--tiny"):
        with pytest.raises((AssertionError, SystemExit)):
            check_make(["bench", wrong], monkeypatch)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{COMMANDS[command]}: {command}")
def test_a_command_can_be_run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command.replace("...", "").replace("…", ""))
    while re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    if words[0] == "make":
        check_make(words[1:], monkeypatch)
    elif "-m" in words and words[words.index("-m") - 1] in ("python", "python3"):
        first = words.index("-m") + 1
        arguments = [word.partition("|")[0] if re.fullmatch(r"[\w|]+", word) else word for word in words[first + 1 :]]
        check_module(words[first], arguments, monkeypatch)
    if words[0] in ("python", "python3") and words[1:2] and not words[1].startswith("-"):
        assert (ROOT / words[1]).exists()
    if words[0].startswith(".ci/"):
        assert (ROOT / words[0]).exists()


def test_pages_name_commands() -> None:
    assert len(COMMANDS) >= 40
