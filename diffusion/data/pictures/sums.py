"""Checksums of pictures, small ones without a pause in which another thread takes Python's lock."""

from collections.abc import Callable, Sequence

_HELD = 5_000  # bytes that zlib sums without letting go of the lock
_SMALL = 2**14  # bytes, summed in 5 us: to get the lock back would take longer


def sum_of(data: bytes | memoryview, function: Callable[..., int], total: int = 0) -> int:
    """zlib's crc32 or adler32 of `data`; total: of nothing, 0 and 1."""
    if not _HELD < len(data) <= _SMALL:
        return function(data, total)
    view = memoryview(data)
    for start in range(0, len(view), _HELD):
        total = function(view[start : start + _HELD], total)
    return total


def sums_of(pictures: Sequence[bytes | memoryview], function: Callable[..., int]) -> list[int]:
    """`sum_of` each."""
    if max(map(len, pictures), default=0) <= _HELD:
        return list(map(function, pictures))
    return [sum_of(data, function) for data in pictures]
