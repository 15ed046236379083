"""Each odd file is read to its exact pixels, each hostile one is named; neither changes the process that reads it."""

import numpy as np
import pytest

from diffusion.data.decode import BadPicture, decode_all
from tests.hostile import hostile, odd


@pytest.mark.parametrize("case", odd(), ids=lambda case: case.name)
def test_what_is_odd_but_right_gives_its_pixels(case):
    pixels = decode_all(case.data)
    assert (pixels.shape, pixels.dtype) == (case.pixels.shape, np.uint8)
    assert np.abs(pixels.astype(int) - case.pixels).max() <= case.within


@pytest.mark.parametrize("case", hostile(), ids=lambda case: case.name)
def test_what_is_hostile_is_named(case):
    with pytest.raises(BadPicture) as error:
        decode_all(case.data)
    assert error.value.kind == case.kind, str(error.value)
    assert " at 0x" not in str(error.value)  # an address would differ from run to run
