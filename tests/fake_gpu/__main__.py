"""Run a command on a fake GPU, an H100 whose kernels do nothing:

    python tests/fake_gpu [--devices N] COMMAND ...
    python tests/fake_gpu python -m pytest -m gpu -p tests.fake_gpu.plugin

It needs PyTorch built for CUDA, Triton and a C compiler, but no GPU and no driver. The command `python` starts the
interpreter that runs this script. `tests.fake_gpu.plugin` reports failures caused by wrong values as expected failures.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.fake_gpu import library  # noqa: E402  needs the repository on the path


def main() -> int:
    """Replace this process by the command. Return 1 if the fake GPU cannot be built."""
    parser = argparse.ArgumentParser(prog="python tests/fake_gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--devices", type=int, default=1, help="number of fake GPUs; default %(default)s")
    parser.add_argument("--caching", action="store_true", help="use PyTorch's caching allocator, to time the host")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="command to run")
    options = parser.parse_args()
    if not options.command:
        parser.error("name a command to run")
    if reason := library.why_not():
        print(f"✗ no fake GPU: {reason}")
        return 1
    command = options.command
    if command[0] in ("python", "python3"):
        command[0] = sys.executable
    variables = library.environment(library.build(), options.devices, options.caching)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.execvpe(command[0], command, {**os.environ, **variables, "PYTHONPATH": path})


if __name__ == "__main__":
    sys.exit(main())
