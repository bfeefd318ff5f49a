"""Show where the time of a step goes, by batch and phase, against what this device copies and multiplies.

    python -m bench.profile [--optimizer NAME] [--model NAME] [--device cuda|cpu] [--frequency T] [--steps N]
                            [--out DIRECTORY] [--nsys]

Takes steps until two updates of the factors are done and every kernel is compiled, and then N more under
`torch.profiler`. Writes their trace (for chrome://tracing or ui.perfetto.dev) and the table of the phases, as Markdown
and as JSON. If Nsight Systems or Nsight Compute is attached, or with --nsys, these tools measure, and the N steps lie
between cudaProfilerStart and cudaProfilerStop:

    nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi python -m bench.profile
    ncu --profile-from-start off --nvtx --nvtx-include "IFShampoo.step/*/factor update" python -m bench.profile
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from bench.common import roofline
from bench.common.gpt import GPT2
from bench.common.gpu import why_no_gpu
from bench.common.record import gpu, provenance, slug, write_json
from bench.common.tensors import Model
from bench.common.timing import Timer, clock_of
from bench.profile.phases import MULTIPLIED, markdown, rows_of
from bench.profile.step_trace import read, steps
from rootfree_kernels import IFShampoo, RFAdaGrad, RFRMSProp, ranges

MODELS = {
    "gpt2-124m": GPT2(),
    "gpt2-small": GPT2(depth=4, width=256, vocabulary=4096, context=256),
    "tiny": GPT2(depth=1, width=8, vocabulary=50, context=4),
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {x.__name__: x for x in (IFShampoo, RFRMSProp, RFAdaGrad)}
CEILINGS = {"cuda": (1 << 29, 8192), "cpu": (1 << 24, 1024)}
"""Numbers of the copy and side of the product that give the roofline."""


def make_optimizer(options: argparse.Namespace, device: torch.device) -> Optimizer:
    params = Model(MODELS[options.model], device).params
    period = {"precondition_frequency": options.frequency} if options.optimizer == "IFShampoo" else {}
    return OPTIMIZERS[options.optimizer](params, lr=1e-4, batch_size=16, **period)


def take_steps(optimizer: Optimizer, number: int, device: torch.device) -> None:
    """Take steps, and wait until the device has done them."""
    for _ in range(number):
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- measured by others --------------------------------------------------------------------------------------------


def is_attached(device: torch.device) -> bool:
    """Return whether a tool listens to NVTX ranges."""
    if device.type != "cuda":
        return False
    with ranges.step("who listens"):
        return ranges.listened


def show_steps(run: Callable[[], None]) -> None:
    """Take the steps between cudaProfilerStart and cudaProfilerStop."""
    torch.cuda.profiler.start()
    run()
    torch.cuda.profiler.stop()


# ---- measured here -------------------------------------------------------------------------------------------------


def trace_steps(run: Callable[[], None], device: torch.device, path: Path) -> None:
    """Take the steps under `torch.profiler`, and write its trace to `path`."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        run()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


def measure_roofline(device: torch.device, tiny: bool) -> roofline.Roofline:
    numbers, side = (1 << 16, 64) if tiny else CEILINGS[device.type]
    timer = Timer(clock_of(device), warmups=2, repeats=20, min_repeats=3, seconds=2.0)
    return roofline.measure(timer, device, numbers, side)


def report(options: argparse.Namespace, optimizer: Optimizer, device: torch.device, command: str) -> Path:
    """Profile the steps, write trace and tables, and return the path of the Markdown."""
    record = {**provenance(command), **gpu(device)}
    name = f"profile-{slug(options.optimizer)}-{slug(options.model)}-{slug(record['device'])}-{record['date']}"
    trace = options.out / f"{name}.trace.json.gz"
    trace_steps(partial(take_steps, optimizer, options.steps, device), device, trace)
    roof = measure_roofline(device, options.model == "tiny")
    found = steps(read(trace), f"{options.optimizer}.step")
    rows = rows_of(found, optimizer, roof, device.type == "cuda")
    record |= {
        "optimizer": options.optimizer,
        "model": options.model,
        "frequency": options.frequency,
        "steps": len(found),
        "trace": trace.name,
        "copy_bytes_per_second": roof.bandwidth,
        "product_flops_per_second": {str(dtype): roof.rate(dtype) for dtype in MULTIPLIED},
    }
    path = options.out / f"{name}.md"
    write_json(path.with_suffix(".json"), {**record, "rows": [row.as_json() for row in rows]})
    path.write_text(markdown(record, rows, roof, device.type == "cuda"), encoding="utf-8")
    return path


# ---- command line --------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="IFShampoo")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=here, help="default here: %(default)s")
    parser.add_argument("--model", choices=MODELS, help="default gpt2-124m, on a CPU gpt2-small")
    parser.add_argument("--frequency", type=int, default=1, metavar="T", help="IFShampoo updates every T-th step")
    parser.add_argument("--steps", type=int, metavar="N", help="default: the least multiple of T from 10 on")
    parser.add_argument("--out", type=Path, default=Path("runs/profile"), metavar="DIRECTORY")
    parser.add_argument("--nsys", action="store_true", help="a tool measures, though no NVTX range reaches it")
    options = parser.parse_args(arguments)
    options.model = options.model or ("gpt2-124m" if options.device == "cuda" else "gpt2-small")
    options.steps = options.steps or options.frequency * math.ceil(10 / options.frequency)
    return options


def why_not(options: argparse.Namespace) -> str | None:
    """Return why nothing can be profiled, or None."""
    if options.device == "cuda" and (why := why_no_gpu()):
        return f"--device cuda: {why}. Use --device cpu."
    if options.device == "cpu" and options.nsys:
        return "--nsys with --device cpu: nsys and ncu measure GPUs. Leave it out."
    if options.frequency < 1 or options.steps < 1:
        return f"--frequency {options.frequency} --steps {options.steps}: pass 1 or more."
    if options.device == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set, which runs kernels on the CPU: unset it to profile them."
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile, and return the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse_arguments(given)
    if problem := why_not(options):
        print(f"✗ {problem}")
        return 1
    device = torch.device(options.device)
    optimizer = make_optimizer(options, device)
    take_steps(optimizer, max(options.frequency + 1, 3), device)
    if options.nsys or is_attached(device):
        show_steps(partial(take_steps, optimizer, options.steps, device))
        print(f"{options.steps} steps of {options.optimizer} between cudaProfilerStart and cudaProfilerStop.")
        return 0
    command = shlex.join(["python", "-m", "bench.profile", *given])
    path = report(options, optimizer, device, command)
    print(path.read_text(encoding="utf-8"))
    print(f"Wrote {path}, {path.with_suffix('.json').name} and {path.stem}.trace.json.gz.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
