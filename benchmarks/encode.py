"""Time and memory of the TopK encode beside plain PyTorch, after a check that both give the same answer.

Prints a table and writes results/encode-<device>.csv; ratios are to `F.linear` alone, taken in the same run.

    python benchmarks/encode.py [--tokens 1024] [--repeats 5]
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from qscope_monitor.kernels.topk_encode import topk_encode

RESULTS = Path(__file__).parent / "results"
SHAPES = ((192, 3072, 32), (1024, 16384, 50), (2048, 32768, 50))  # (d_model, d_sae, k); the last is Qwen3-1.7B's


def timed(call: Callable[[], object], repeats: int) -> float:
    """Median milliseconds after one warm-up."""
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times)


def largest_allocation(call: Callable[[], object], inputs: tuple[torch.Tensor, ...]) -> int:
    """Bytes of the largest single tensor made inside `call`; views of the inputs are none."""
    from torch.utils._python_dispatch import TorchDispatchMode

    given = {tensor.untyped_storage().data_ptr() for tensor in inputs}

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                    self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
            return result

    with Largest() as largest:
        call()
    return largest.bytes


def main() -> None:
    """Check, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    rows = []
    for d_model, d_sae, k in SHAPES:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(arguments.tokens, d_model, generator=generator).to(device)
        weight = (torch.randn(d_sae, d_model, generator=generator) / d_model**0.5).to(device)
        bias = torch.zeros(d_sae, device=device)

        def linear(x: torch.Tensor = x, weight: torch.Tensor = weight, bias: torch.Tensor = bias) -> torch.Tensor:
            return F.linear(x, weight, bias)

        def plain(k: int = k, linear: Callable[[], torch.Tensor] = linear) -> torch.Tensor:
            return linear().topk(k, -1).values.relu()

        def ours(x=x, weight=weight, bias=bias, k=k) -> torch.Tensor:
            return topk_encode(x, weight, bias, k).values

        torch.testing.assert_close(ours(), plain(), rtol=1e-4, atol=1e-4)
        floor = timed(linear, arguments.repeats)
        for form, call in (("F.linear", linear), ("F.linear + topk + relu", plain), ("topk_encode", ours)):
            milliseconds = floor if call is linear else timed(call, arguments.repeats)
            rows.append(
                {
                    "d_model": d_model,
                    "d_sae": d_sae,
                    "k": k,
                    "tokens": arguments.tokens,
                    "form": form,
                    "milliseconds": round(milliseconds, 2),
                    "ratio_to_linear": round(milliseconds / floor, 3),
                    "largest_tensor_mb": round(largest_allocation(call, (x, weight, bias)) / 2**20, 1),
                    "device": name,
                    "threads": torch.get_num_threads(),
                    "torch": torch.__version__,
                }
            )
            print({key: rows[-1][key] for key in list(rows[-1])[:8]})
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"encode-{device}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
