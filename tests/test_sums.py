"""Sums taken piece by piece are those of the whole."""

from zlib import adler32, crc32

import pytest

from diffusion.data.pictures.sums import sum_of, sums_of


@pytest.mark.parametrize("size", [0, 1, 4_999, 5_000, 5_001, 10_000, 2**14, 2**14 + 1, 10**5])
def test_a_sum_is_that_of_all_bytes_however_many(size):
    data = bytes(i * i % 251 for i in range(size))
    for own in (data, memoryview(data)):
        assert sum_of(own, crc32) == crc32(data)
        assert sum_of(own, adler32, 1) == adler32(data)


@pytest.mark.parametrize("largest", [0, 5_000, 5_001, 2**14 + 1])
def test_sums_of_many_are_those_of_each(largest):
    pictures = [bytes(range(size % 251)) * (size // 251 + 1) for size in range(0, largest + 1, 500)]
    assert sums_of(pictures, crc32) == [crc32(picture) for picture in pictures]
    assert sums_of([], crc32) == []
