"""The report of `python -m rootfree_kernels`."""

from __future__ import annotations

import os
import subprocess
import sys

import torch


def report(**environment):
    command = [sys.executable, "-m", "rootfree_kernels"]
    compiled = {"TRITON_INTERPRET": "0"}  # the default for users: kernels run only on GPUs
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **compiled, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_report_names_versions_devices_backends_and_reasons():
    text = report()
    for word in ("rootfree-kernels", torch.__version__, "triton", "cpu:", "bfloat16", "eager", "not triton:"):
        assert word in text


def test_the_report_shows_the_measured_dtype_of_products():
    assert "bfloat16 factors are multiplied in" in report()
    assert "a BF16 product of " in report()


def test_the_report_says_when_a_forced_backend_cannot_run():
    text = report(ROOTFREE_BACKEND="triton")
    assert "ROOTFREE_BACKEND=triton" in text and "it does not run on cpu devices" in text
