"""The machine's measured ceiling, by convolution and by matrix product: what a share of the peak is a share of."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F


def seconds(call: Callable[[], object], *, repeats: int = 10, device: str = "cpu") -> float:
    """The fastest of some runs, after two to warm up."""
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            times.append(time.perf_counter() - start)
    return min(times)


def peaks(dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """FLOP/s of a 3 x 3 convolution (channels_last, forward) and of a matrix product, in `dtype`."""
    n = 2048 if device == "cpu" else 8192
    side, channels, batch = 16, 256 if device == "cpu" else 1024, 32
    a = torch.randn(n, n, device=device).to(dtype)
    x = torch.randn(batch, channels, side, side, device=device).to(dtype, memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        matmul = seconds(lambda: a @ a, device=device)
        convolution = seconds(lambda: F.conv2d(x, w, padding=1), device=device)
    return {"conv": 2 * 9 * channels**2 * side**2 * batch / convolution, "matmul": 2 * n**3 / matmul}
