"""A device's measured ceiling, by matrix product and by convolution: what a share of the peak is a share of."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F


def peaks(dtype: torch.dtype, device: torch.device | str = "cpu", *, budget_s: float = 0.15) -> dict[str, float]:
    """FLOP/s of a matrix product and of a 3 x 3 convolution (channels_last, forward) in `dtype`, by the fastest of the calls
    that fit into `budget_s` for each, after one to warm up: under a second on a core of a CPU, beside what else it does."""
    on_cpu = torch.device(device).type == "cpu"
    n = 1024 if on_cpu else 8192
    side, channels, batch = 16, 256 if on_cpu else 1024, 32
    own = torch.Generator(device).manual_seed(0)  # numbers that differ: of equal ones hardware makes less work

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=device, generator=own).to(dtype)

    a = drawn(n, n)
    x = drawn(batch, channels, side, side).to(memory_format=torch.channels_last)
    w = drawn(channels, channels, 3, 3).to(memory_format=torch.channels_last)
    with torch.no_grad():
        matmul = _fastest_s(lambda: a @ a, device, budget_s)
        convolution = _fastest_s(lambda: F.conv2d(x, w, padding=1), device, budget_s)
    return {"matmul": 2 * n**3 / matmul, "conv": 2 * 9 * channels**2 * side**2 * batch / convolution}


def _fastest_s(call: Callable[[], object], device: torch.device | str, budget_s: float) -> float:
    def timed() -> float:
        start = time.perf_counter()
        call()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()
    times = [timed()]
    while sum(times) < budget_s:
        times.append(timed())
    return min(times)
