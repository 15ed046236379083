"""Each odd file is read to its exact pixels, each hostile one is named; neither changes the process that reads it."""

from pathlib import Path

import numpy as np
import pytest

from diffusion.data import quarantine
from diffusion.data.ingest import shard_dataset
from diffusion.data.manifest import DUPLICATE
from diffusion.data.pictures.decode import BadPicture, decode_all, decode_png
from diffusion.data.pictures.fit import fit
from diffusion.data.quarantine import TooManyRejected
from diffusion.recipe import ShardRecipe
from diffusion.store.storage import open_storage
from tests.hostile import Hostile, hostile
from tests.odd_files import Odd, odd
from tests.published import samples_of


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


def folder_of(path: Path, cases: list[Odd] | list[Hostile]) -> dict[str, Odd | Hostile]:
    """One class; named as pictures, since other files are no part of a source."""
    path.mkdir()
    named = {f"{path.name}/{case.name.replace('.', '-')}.png": case for case in cases}
    for name, case in named.items():
        (path.parent / name).write_bytes(case.data)
    return named


def test_the_shard_stage_takes_what_is_right_and_sets_aside_the_rest_with_its_reason(tmp_path):
    right = folder_of(tmp_path / "right", odd())
    wrong = folder_of(tmp_path / "wrong", hostile())
    root = tmp_path / "root"
    ref = shard_dataset(tmp_path, ShardRecipe(resolution=8, shard_size=64, max_rejected=0.9), root)
    aside = {file.name: file.kind for file in quarantine.entries(open_storage(root), ref.digest)}
    assert {name: kind for name, kind in aside.items() if name in wrong} == {name: c.kind for name, c in wrong.items()}
    assert {kind for name, kind in aside.items() if name in right} <= {DUPLICATE}
    sharded = {sample.facts["source"]: sample for sample in samples_of(ref.uri)}
    assert sharded.keys() == right.keys() - aside.keys()
    assert len(sharded) > 50  # the others have the pixels of one of these
    for name, sample in sharded.items():
        if right[name].within == 0:
            expected = fit(np.ascontiguousarray(right[name].pixels), size=(8, 8), background="#ffffff")
            assert np.array_equal(decode_png(sample.image), expected)


def test_a_source_of_which_nothing_can_be_used_is_refused_with_all_reasons(tmp_path):
    folder_of(tmp_path / "wrong", hostile())
    with pytest.raises(TooManyRejected) as error:
        shard_dataset(tmp_path, ShardRecipe(resolution=8, max_rejected=0.5), tmp_path / "root")
    for kind in {case.kind for case in hostile()}:
        assert kind in str(error.value)
    assert not (tmp_path / "root" / "datasets").exists()
