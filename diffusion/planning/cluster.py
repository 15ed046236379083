"""What many machines cost each other: sums of gradients, lost work, checkpoints.  Formulas alone."""

import math


def ring_s(size: float, world: int, bytes_s: float, *, latency_s: float = 0.0) -> float:
    """Seconds that a ring takes to sum `size` bytes over `world` processes, each sending `bytes_s`: 2 (W - 1) messages of
    size / W.  [Patarasuk & Yuan 2009, Sec. 3]"""
    if world < 2:
        return 0.0
    return 2 * (world - 1) * (size / world / bytes_s + latency_s)


def best_interval_s(write_s: float, mtbf_s: float) -> float:
    """Seconds of work between checkpoints that lose least, where one stops the run for `write_s` and something fails every
    `mtbf_s`.  [Daly 2006, Eq. 37; its first term is Young 1974]"""
    if write_s <= 0 or mtbf_s <= 0:
        raise ValueError(f"write_s={write_s:g} and mtbf_s={mtbf_s:g}: both are above 0")
    if write_s >= 2 * mtbf_s:
        return mtbf_s
    half = write_s / (2 * mtbf_s)
    return math.sqrt(2 * write_s * mtbf_s) * (1 + math.sqrt(half) / 3 + half / 9) - write_s


def lost_share(interval_s: float, write_s: float, restart_s: float, mtbf_s: float) -> float:
    """Share by which a run with checkpoints every `interval_s` of work takes longer than one without failures and
    checkpoints; failures come at random.  [Daly 2006, Eq. 20]"""
    turns = math.expm1((interval_s + write_s) / mtbf_s) / interval_s
    return mtbf_s * math.exp(restart_s / mtbf_s) * turns - 1
