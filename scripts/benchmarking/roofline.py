"""How fast a block would be if it were nothing but its matrix products, attentions and convolutions."""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from scripts.benchmarking.operations import Operation
from wan.attention import fastest

BLOCK_STAGES = ("denoise", "clean pass", "decode")
ROUNDS = 5


@contextmanager
def _fastest_convolutions():
    """Has cuDNN try its algorithms and keep the fastest. It keeps them for the rest of the process, so what uses its
    convolutions as they come must be measured before."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _seconds(call: Callable[[], Tensor], device: torch.device, calls: int) -> float:
    """Of one of `calls` calls in a row."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / calls
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


@torch.inference_mode()
def time_operation(operation: Operation, device: torch.device, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Seconds of one call in each way that the operation can be done: the median of rounds that take about `seconds`
    together. Inputs are random, since a GPU that multiplies zeros draws less power and runs faster than it would."""
    draw = lambda *sizes: torch.randn(sizes, device=device).to(dtype)
    with fastest(device), _fastest_convolutions():
        return {way: _time(call, device, seconds) for way, call in operation.bind(draw).items()}


def _time(call: Callable[[], Tensor], device: torch.device, seconds: float) -> float:
    _seconds(call, device, 1)  # picks algorithms
    once = min(_seconds(call, device, 1) for _ in range(2))
    calls = max(1, min(1000, int(seconds / ROUNDS / once)))
    return statistics.median(_seconds(call, device, calls) for _ in range(ROUNDS))


def time_all(operations: dict[str, Counter[Operation]], device: torch.device, dtype: torch.dtype,
             seconds: float) -> dict[Operation, dict[str, float]]:
    """Seconds of a call of each operation, of any stage, in each way that it can be done."""
    return {operation: time_operation(operation, device, dtype, seconds)
            for operation in dict.fromkeys(operation for counts in operations.values() for operation in counts)}


def _row(parts: list[tuple[int, int, float]]) -> dict[str, Any]:
    """The sum of (calls, FLOP of a call, seconds of a call)."""
    flops, seconds = sum(n * f for n, f, _ in parts), sum(n * s for n, _, s in parts)
    return {"calls": sum(n for n, _, _ in parts), "tflop": flops / 1e12, "ms": 1000 * seconds,
            "tflop_per_s": flops / 1e12 / seconds if seconds else None}


def summary(operations: dict[str, Counter[Operation]], seconds: dict[Operation, dict[str, float]],
            measured: dict[str, float | None]) -> dict[str, Any]:
    """The table of a roofline, for JSON.

    operations: {stage: {operation: calls}}; seconds: of a call of each, in each way: the fastest counts; measured:
    {stage: ms}, and "block", the wall clock of a block. → "stages": {stage or "block": {"ceiling_ms", "measured_ms",
    "fraction", "kinds": {kind: row}}}, "kinds": {kind: row} of a block, "operations": a row for each with its calls in
    each stage. A row has calls, tflop, ms and tflop_per_s; an operation's also the ms of each way. fraction =
    ceiling / measured: 1 where nothing but these operations takes time.
    """
    best = {operation: min(ways.values()) for operation, ways in seconds.items()}
    block: Counter[Operation] = sum((operations[s] for s in BLOCK_STAGES if s in operations), Counter())
    stages = {}
    for name, counts in {"block": block, **operations}.items():
        parts = {kind: [(n, op.flops, best[op]) for op, n in counts.items() if op.kind == kind]
                 for kind in sorted({op.kind for op in counts})}
        ceiling, taken = _row([part for rows in parts.values() for part in rows])["ms"], measured.get(name)
        stages[name] = {"ceiling_ms": ceiling, "measured_ms": taken, "fraction": ceiling / taken if taken else None,
                        "kinds": {kind: _row(rows) for kind, rows in parts.items()}}
    rows = [{"kind": op.kind, "shape": str(op), "calls": {s: c[op] for s, c in operations.items() if c[op]},
             "gflop": op.flops / 1e9, "ms": 1000 * t, "tflop_per_s": op.flops / 1e12 / t,
             "ways": {way: 1000 * each for way, each in seconds[op].items()}} for op, t in best.items()]
    return {"stages": stages, "kinds": stages["block"]["kinds"], "operations": rows}
