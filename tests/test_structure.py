"""Structure of the source: short signatures, no import cycles, and few changes between files during a step."""

from __future__ import annotations

import pytest

from tests.calls.cpu import needs_cpp
from tests.tools import file_changes, signatures

MOST_PARAMETERS = 8
MOST_CHANGES = {"eager": 90, "cpp": 50}


def listed(findings: list[signatures.Finding]) -> str:
    return "\n".join(str(finding) for finding in findings)


def test_functions_have_few_parameters() -> None:
    found = [finding for finding in signatures.many_parameters(most=MOST_PARAMETERS) if not finding.allowed]
    assert not found, listed(found)


@pytest.mark.parametrize("in_functions", [False, True], ids=["modules", "functions"])
def test_there_are_no_import_cycles(in_functions: bool) -> None:
    found = signatures.import_cycles(in_functions=in_functions)
    assert not found, listed(found)


@pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=needs_cpp)])
def test_a_step_moves_between_files_rarely(backend: str) -> None:
    assert file_changes.count(backend) <= MOST_CHANGES[backend]
