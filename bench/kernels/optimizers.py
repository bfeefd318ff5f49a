"""Whole steps of the optimizers on GPT-2 124M: host, device, CUDA graph, and the first step, which compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.common.gpt import GPT2
from bench.common.optimizers import ENTRIES, WHOLE
from bench.common.report import Row, Target
from bench.common.roofline import Work, diagonal_bytes, whole_step
from bench.common.tensors import Model
from bench.kernels.cases import Case, Context, attempt, ratio, relative_error, require
from rootfree_kernels import IFShampoo, RFRMSProp

HOST, DEVICE, GRAPH, FIRST = "Host time of a step", "Device time of a step", "CUDA graphs", "First step"

NOTES = {
    HOST: "µs of the host in `step()`, queue empty before, no synchronisation within. Same addresses: gradients stay "
    "where they are (`set_to_none=False`). New addresses: each gradient lies elsewhere in every step, which "
    "`set_to_none=True` comes to at worst.",
    DEVICE: "FP32 weights, gradients and state, BF16 factors. Of roofline: as for the factor update, over all launches "
    "of the step.",
    GRAPH: "The step captured with `capturable=True` and replayed, checked against the same steps without a graph.",
    FIRST: "Seconds from the optimizer's constructor to the end of its first step, in a process of its own; what is "
    "left of them without Triton's compilations shows with its cache warm.",
}

OTHER_STEP = 1 << 30
"""A T with which every step but the first is without an update."""

OURS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "IFShampoo T=1": partial(IFShampoo, batch_size=16, precondition_frequency=1),
    "IFShampoo T=10, other step": partial(IFShampoo, batch_size=16, precondition_frequency=OTHER_STEP),
    "RFRMSProp": partial(RFRMSProp, batch_size=16),
}

PEERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    name: partial(ENTRIES[name].make, period=1, block=WHOLE) for name in ("AdamW, fused", "RMSprop, foreach")
}


# ---- host and device -----------------------------------------------------------------------------------------------


def host_rows(name: str, make: Callable[..., torch.optim.Optimizer], is_ours: bool, context: Context) -> list[Row]:
    model = Model(context.sizes.model, context.device)
    optimizer = make(model.params, lr=1e-4)
    optimizer.step()
    same = context.timer.host(optimizer.step)
    new = context.timer.host(optimizer.step, model.move_gradients)
    cells = {"same addresses, µs": same, "new addresses, µs": new}
    return [Row(HOST, name, cells, {"same addresses, µs": Target("≤", 500.0)} if is_ours else {})]


def device_rows(context: Context) -> list[Row]:
    """Time every optimizer, also with the eager backend, each on parameters of its own; they take turns."""
    rows: list[Row] = []
    makers = {**OURS, **{f"{name}, eager": partial(make, fused=False) for name, make in OURS.items()}, **PEERS}

    def stepped(make: Callable[..., torch.optim.Optimizer]) -> Callable[[], Any]:
        optimizer = make(Model(context.sizes.model, context.device).params, lr=1e-4)
        optimizer.step()
        return optimizer.step

    steps = {name: attempt(rows, DEVICE, name, partial(stepped, make)) for name, make in makers.items()}
    measured = context.timer.measure({name: [step] for name, step in steps.items() if step})
    least = limits(context.sizes.model)
    for name, (timing, _) in measured.items():
        cells: dict[str, Any] = {"µs": timing}
        if name in least:
            cells["of roofline"] = context.fraction(least[name], timing)
        if f"{name}, eager" in measured:
            cells["eager / ours"] = ratio(measured[f"{name}, eager"].total, timing)
        if name in OURS and "AdamW, fused" in measured:
            cells["ours / fused AdamW"] = timing.median / measured["AdamW, fused"].total.median
        rows.append(Row(DEVICE, name, cells))
    update, other, _ = OURS
    if update in measured and other in measured:
        mean = (measured[update].total.median + 9 * measured[other].total.median) / 10
        rows.append(Row(DEVICE, "IFShampoo T=10, one update and nine other steps", {"mean µs": mean}))
    return rows


def limits(gpt2: GPT2) -> dict[str, Work]:
    """Return the work of a step, by name of the optimizer."""
    update, other, _ = OURS
    diagonal = Work(0, diagonal_bytes(torch.float32, torch.float32, torch.float32) * gpt2.num_numbers())
    diagonals = dict.fromkeys(("RFRMSProp", *PEERS), diagonal)
    return {update: whole_step(gpt2, True), other: whole_step(gpt2, False), **diagonals}


# ---- CUDA graphs ---------------------------------------------------------------------------------------------------


def graph_rows(name: str, make: Callable[..., torch.optim.Optimizer], context: Context) -> list[Row]:
    """Capture a step, replay it on other gradients next to a twin without a graph, and time both."""
    model, twin = (Model(context.sizes.model, context.device) for _ in range(2))
    optimizer, plain = (make(x.params, lr=1e-4, capturable=True) for x in (model, twin))
    for _ in range(3):
        plain.step()
    graph = captured(optimizer.step, warmups=3)
    for seed in (5, 6):
        for each in (model, twin):
            for param, grad in zip(each.params, each.new_gradients(seed), strict=True):
                param.grad.copy_(grad)
        graph.replay()
        plain.step()
    error = relative_error([x.detach() for x in model.params], [x.detach().double() for x in twin.params])
    require(error < 1e-6, f"a replay is not the step: relative error {error:.1e}")
    measured = context.timer.measure({"graph": [graph.replay], "plain": [plain.step]})
    cells = {
        "replayed, device µs": measured["graph"].total,
        "plain, device µs": measured["plain"].total,
        "replay, host µs": context.timer.host(graph.replay),
    }
    return [Row(GRAPH, name, cells)]


def captured(step: Callable[[], Any], warmups: int) -> torch.cuda.CUDAGraph:
    """Return a graph of `step`, which first runs `warmups` times in a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmups):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


# ---- the first step ------------------------------------------------------------------------------------------------


def first_steps(context: Context) -> dict[str, list[float]]:
    """Return the seconds of the first and of the second step in this process, by optimizer."""
    seconds = {}
    for name, make in OURS.items():
        model = Model(context.sizes.model, context.device)
        times = []
        context.timer.clock.synchronize()
        start = time.perf_counter()
        optimizer = make(model.params, lr=1e-4)
        for _ in range(2):
            optimizer.step()
            context.timer.clock.synchronize()
            times.append(time.perf_counter() - start)
            start = time.perf_counter()
        seconds[name] = times
    return seconds


def first_rows(arguments: list[str]) -> list[Row]:
    """Time first steps in processes of their own: with Triton's cache empty, then with what the first left there."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for state in ("empty", "warm"):
            command = [sys.executable, "-m", "bench.kernels", "--first-step", *arguments]
            environment = {**os.environ, "TRITON_CACHE_DIR": cache}
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
            if run.returncode:
                raise RuntimeError(run.stderr.strip().splitlines()[-1])
            for name, (first, second) in json.loads(run.stdout.splitlines()[-1]).items():
                cells = {"first step, s": first, "second step, s": second}
                rows.append(Row(FIRST, f"{name}, cache {state}", cells))
    return rows


def optimizer_cases(context: Context, arguments: list[str]) -> list[Case]:
    """Return the cases; `arguments` give `python -m bench.kernels --first-step` the same device and sizes."""
    makers = {**OURS, **PEERS}
    cases = [Case(HOST, name, partial(host_rows, name, make, name in OURS, context)) for name, make in makers.items()]
    cases.append(Case(DEVICE, "GPT-2 124M", partial(device_rows, context)))
    return [*cases, Case(FIRST, "first steps", partial(first_rows, arguments))]


def graph_cases(context: Context) -> list[Case]:
    if context.device.type != "cuda":
        return []
    capturable = {name: make for name, make in OURS.items() if "other" not in name}
    return [Case(GRAPH, name, partial(graph_rows, name, make, context)) for name, make in capturable.items()]
