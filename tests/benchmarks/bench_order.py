"""What the order costs: `python -m tests.benchmarks.bench_order`.

CPU time per picture of `Order.at` as a run asks for it, batch after batch (limit 150 ns: it shares the interpreter's lock
with the readers; 250 ns of a `Mixture`), for 10,000 to 1,000,000,000 pictures; time of one answer at a random position of
a random epoch, nothing remembered; memory by tracemalloc.  Beside it a whole permutation by torch, which samplers make for
each epoch, where it fits: its time and its 8 bytes a picture.
"""

import argparse
import random
import statistics
import time
import tracemalloc

import torch

from diffusion.data.order import Mixture, Order

LIMIT_NS, LIMIT_MIXTURE_NS = 150, 250
LIMIT_KIB = 1024
BATCHES = (32, 64, 128, 256)
PICTURES = (10**4, 10**5, 10**7, 10**9)
PERMUTED = 10**7  # at most: 80 MB


def order_over(pictures: int) -> Order:
    return Order(pictures, block=1_024, seed=1, window=1_024, streams=8)


def in_turn_ns(sequence: Order | Mixture, batch: int, seconds: float) -> float:
    """CPU nanoseconds a picture, batch after batch from a random position: the best of five, as others use the machine."""
    position, best = random.randrange(10 * len(sequence)), float("inf")
    for _ in range(5):
        start, began = position, time.process_time()
        while (now := time.process_time()) < began + seconds / 5:
            for _ in range(2**16 // batch):
                sequence.at(position, batch)
                position += batch
        best = min(best, (now - began) / (position - start) * 1e9)
    return best


def at_once_us(pictures: int, answers: int = 50) -> float:
    """Microseconds of a first answer: 256 pictures anywhere.  Median."""
    times = []
    for _ in range(answers):
        order, position = order_over(pictures), random.randrange(100 * pictures)
        began = time.perf_counter()
        order.at(position, 256)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def memory_kib(pictures: int) -> tuple[float, float]:
    """KiB that an order keeps after many answers, and its most at any time."""
    tracemalloc.start()
    order = order_over(pictures)
    for _ in range(50):
        order.at(random.randrange(100 * pictures), 256)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return kept / 1024, most / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure of `in turn`")
    options = parser.parse_args()
    random.seed(0)
    slowest = fattest = 0.0
    print(
        "pictures        "
        + "".join(f"batch {batch:<4d}" for batch in BATCHES)
        + "first answer   kept      most      torch.randperm of an epoch"
    )
    for pictures in PICTURES:
        costs = [in_turn_ns(order_over(pictures), batch, options.seconds) for batch in BATCHES]
        kept, most = memory_kib(pictures)
        slowest, fattest = max(slowest, *costs), max(fattest, most)
        if pictures <= PERMUTED:
            began = time.perf_counter()
            permutation = torch.randperm(pictures)
            whole = f"{(time.perf_counter() - began) * 1e3:.2f} ms, {permutation.nbytes / 1024:,.0f} KiB"
        else:
            whole = f"- ({8 * pictures / 1024:,.0f} KiB)"
        in_turn = "".join(f"{cost:5.0f} ns  " for cost in costs)
        print(f"{pictures:<15,d} {in_turn}{at_once_us(pictures):7.0f} us  {kept:6.0f} KiB {most:6.0f} KiB   {whole}")
    mixture = Mixture(tuple(order_over(pictures) for pictures in PICTURES), (1, 1, 1, 7), seed=1)
    costs = [in_turn_ns(mixture, batch, options.seconds) for batch in BATCHES]
    print("mixture of 4    " + "".join(f"{cost:5.0f} ns  " for cost in costs))
    passed = slowest <= LIMIT_NS and max(costs) <= LIMIT_MIXTURE_NS and fattest <= LIMIT_KIB
    said = f"{LIMIT_NS} ns a picture, {LIMIT_MIXTURE_NS} of a mixture, {LIMIT_KIB} KiB"
    print(f"limits: {said}: {'passed' if passed else 'FAILED'}")
    raise SystemExit(not passed)


if __name__ == "__main__":
    main()
