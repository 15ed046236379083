"""Features kept in a file: the same numbers, in any order of writing, with no file left behind."""

from pathlib import Path

import numpy as np
import pytest

from diffusion.evaluation.rows import Rows, unnamed


def test_parts_come_in_any_order_to_their_places(tmp_path):
    generator = np.random.default_rng(0)
    features = generator.normal(size=(23, 5)).astype(np.float32)
    small = generator.integers(0, 256, (23, 2, 2, 3), dtype=np.uint8)
    parts = {4: slice(0, 8), 9: slice(8, 8), 2: slice(8, 23)}  # one of none
    for order in ((4, 9, 2), (2, 4, 9)):
        rows = Rows(tmp_path / "new", [(name, part.stop - part.start) for name, part in parts.items()])
        for name in order:
            rows.put(name, {"features": features[parts[name]], "small": small[parts[name]]} if name != 9 else {})
        assert np.array_equal(rows["features"].numpy(), features)
        assert np.array_equal(rows["small"].numpy(), small)
    assert list((tmp_path / "new").iterdir()) == []
    nothing = Rows(tmp_path, [(0, 0)])
    nothing.put(0, {"features": features[:0]})
    assert nothing["features"].shape == (0, 5)


def test_the_file_is_gone_with_the_array(tmp_path):
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    array = unnamed(tmp_path, (100, 100), np.dtype(np.float32))
    array[:] = 1
    assert mapped() == 1  # a file, and no memory of this process's own
    assert list(tmp_path.iterdir()) == []
    del array
    assert mapped() == 0


def test_parts_of_another_width_are_refused(tmp_path):
    rows = Rows(tmp_path, [(0, 2), (1, 2)])
    rows.put(0, {"features": np.zeros((2, 3), np.float32)})
    with pytest.raises(ValueError, match="broadcast"):
        rows.put(1, {"features": np.zeros((2, 4), np.float32)})
