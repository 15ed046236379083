"""Processes for torch.distributed to join."""

import multiprocessing
import os
from collections.abc import Callable

import torch.multiprocessing as mp


def in_processes(count: int, process: Callable[..., None], *arguments: object) -> None:
    """Run process(rank, *arguments) in so many processes, and raise what one of them raises.

    All are forked from a server, so that libraries are imported once: torch, what the first optimizer of a process
    imports, and what the first `process` of this session needs.
    """
    multiprocessing.set_forkserver_preload([process.__module__, "torch._dynamo"])
    mp.start_processes(_on_loopback, (process, arguments), nprocs=count, start_method="forkserver")


def _on_loopback(rank: int, process: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    process(rank, *arguments)
