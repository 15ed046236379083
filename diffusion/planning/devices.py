"""What makers say of their devices: for machines that are not here.

Dense bfloat16 (no sparsity), as NVIDIA's data sheets of the SXM parts state it, or of the card where there is no such part.
Networks reach a share of it, which `--mfu` says; see `diffusion.peak` for what a device was measured to reach.
"""

from typing import NamedTuple


class Device(NamedTuple):
    """One accelerator."""

    name: str
    flop_per_s: float  # bfloat16, dense
    memory: int  # bytes
    memory_bytes_s: float
    link_bytes_s: float  # to the others of its machine, one way


DEVICES = {
    device.name: device
    for device in (
        Device("a100", 312e12, 80 * 10**9, 2.04e12, 300e9),
        Device("h100", 989e12, 80 * 10**9, 3.35e12, 450e9),
        Device("h200", 989e12, 141 * 10**9, 4.8e12, 450e9),
        Device("b200", 2_250e12, 180 * 10**9, 7.7e12, 900e9),
        Device("l40s", 362e12, 48 * 10**9, 0.864e12, 32e9),  # PCIe 4.0, 16 lanes
        Device("l4", 121e12, 24 * 10**9, 0.3e12, 32e9),
    )
}


def device_named(name: str) -> Device:
    """Raises ValueError naming those that are known."""
    if name not in DEVICES:
        raise ValueError(f"--device {name}: known are {', '.join(DEVICES)}; leave it out to measure this machine")
    return DEVICES[name]
