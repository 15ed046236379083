"""The way of a batch to the device, none of it a wait for what the device has to do.  On the CPU everything is there.

Untested on a GPU.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from diffusion.data.stream import Batch

T, U = TypeVar("T"), TypeVar("U")


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device.  From memory that is not pinned a copy would wait for all work that the device has."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def sent_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, on a GPU with pictures, uint8, or latents there: copied on a stream of their own while the device is at
    the batch before.  Labels and positions stay on the CPU, where they are read."""
    if device.type != "cuda":
        return batches
    stream = torch.cuda.Stream(device)

    def send(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            latents = None if batch.latents is None else sent(batch.latents, device)
            return batch._replace(images=sent(batch.images, device), latents=latents), stream.record_event()

    def arrived(sending: tuple[Batch, torch.cuda.Event]) -> Batch:
        batch, there = sending
        computing = torch.cuda.current_stream(device)
        computing.wait_event(there)
        for tensor in (batch.images, batch.latents):
            if tensor is not None:
                tensor.record_stream(
                    computing
                )  # its memory is not given to a copy before the computation is done with it
        return batch

    return one_ahead(batches, send, arrived)


def one_ahead(items: Iterator[T], begin: Callable[[T], U], end: Callable[[U], T]) -> Iterator[T]:
    """end(begin(item)) of each item, the next of which is begun before."""
    begun: list[U] = []
    for item in items:
        begun.append(begin(item))
        if len(begun) == 2:
            yield end(begun.pop(0))
    for one in begun:
        yield end(one)
