"""A few pictures: the right ones, spread, and nothing else read."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from diffusion.data.preview import MAX_ROWS, _spread, preview, sheet
from diffusion.store.storage import LocalFolder
from tests.made_dataset import SIDE, Made, published


class Watched(LocalFolder):
    """Notes what is read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reads: list[tuple[str, int]] = []

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        data = super().read(name, start, size)
        self.reads.append((name, len(data)))
        return data


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched = Watched(tmp_path)
    monkeypatch.setattr("diffusion.data.manifest.root_of", lambda uri: watched)
    return watched


def test_the_pictures_are_those_of_their_class_with_all_captions(root: Watched) -> None:
    pictures = [Made(n, ("cats", "dogs")[n % 2], captions=(f"a {n}", "b")[: n % 3]) for n in range(20)]
    rows = preview(published(root, pictures), n=3)
    by_key = {picture.key: picture for picture in pictures}
    assert {label: len(row) for label, row in rows.items()} == {"cats": 3, "dogs": 3}
    for label, row in rows.items():
        for shown in row:
            made = by_key[shown.key]
            assert (made.label, shown.source) == (label, f"{label}/{made.look}.png")
            assert np.array_equal(shown.image, made.image)
            assert [text for text, _ in shown.captions] == list(made.captions)


def test_it_is_the_same_every_time_and_reads_no_tar_wholly(root: Watched) -> None:
    made = published(root, [Made(n) for n in range(64)], shard_size=4)
    first = [shown.key for shown in preview(made, n=4)["cats"]]
    root.reads.clear()
    again = [shown.key for shown in preview(made, n=4)["cats"]]
    assert first == again
    tars = [(name, size) for name, size in root.reads if name.endswith(".tar")]
    assert len(tars) == 8  # facts and picture of each
    assert sum(size for _, size in tars) < 4 * (3 * SIDE * SIDE + 1024)
    assert len({name for name, _ in tars}) == 4  # each from another shard


def test_of_many_shards_few_indexes_are_read(root: Watched) -> None:
    made = published(root, [Made(n) for n in range(100)], shard_size=1)
    root.reads.clear()
    preview(made, n=8)
    assert Counter(name.rpartition(".")[2] for name, _ in root.reads) == {"npy": 16, "tar": 16}


def test_a_rare_class_is_found_in_the_last_shard_and_given_whole(root: Watched) -> None:
    pictures = sorted((Made(n) for n in range(40)), key=lambda picture: picture.key)
    rare = pictures[-1]._replace(label="rare")
    rows = preview(published(root, [*pictures[:-1], rare], shard_size=2), labels=["rare"], n=8)
    assert [shown.key for shown in rows["rare"]] == [rare.key]
    assert list(rows) == ["rare"]


def test_held_out_pictures_are_not_shown_unless_asked_for(root: Watched) -> None:
    made = published(root, [Made(1), Made(2, split="holdout")])
    assert [s.key for s in preview(made)["cats"]] == [Made(1).key]
    assert [s.key for s in preview(made, split="holdout")["cats"]] == [Made(2).key]


def test_without_labels_the_largest_classes_are_shown_in_their_order(root: Watched) -> None:
    many = [
        Made(100 * label + n, f"class {label:02d}")
        for label in range(MAX_ROWS + 2)
        for n in range(1 + (label not in (3, 5)))
    ]
    rows = preview(published(root, many), n=1)
    assert list(rows) == [f"class {label:02d}" for label in range(MAX_ROWS + 2) if label not in (3, 5)]


def test_an_unknown_class_and_too_few_are_refused(root: Watched) -> None:
    made = published(root, [Made(1)])
    with pytest.raises(ValueError, match=r"no class 'dogs' .* its classes are cats"):
        preview(made, labels=["dogs"])
    with pytest.raises(ValueError, match="at least one"):
        preview(made, n=0)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 100])
def test_the_first_shards_visited_lie_far_apart(count: int) -> None:
    visits = _spread(count)
    assert sorted(visits) == list(range(count))
    for first in (2, 4, 8):
        if count >= 2 * first:
            places = sorted(visits[:first])
            assert min(b - a for a, b in pairwise(places)) >= count // (2 * first)


def test_a_sheet_has_a_row_for_each_name_and_white_where_nothing_is() -> None:
    dark, gap = np.zeros((70, 70, 3), np.uint8), 2
    made = sheet({"a": [dark], "a much longer name than there is room for": [dark, dark]})
    cells = [
        made[y : y + 70, made.shape[1] - x : made.shape[1] - x + 70] for y in (gap, 70 + 2 * gap) for x in (144, 72)
    ]
    assert [(int(cell.min()), int(cell.max())) for cell in cells] == [(0, 0), (255, 255), (0, 0), (0, 0)]
    assert made.shape[0] == 2 * 70 + 3 * gap


def test_small_pictures_are_shown_larger_pixel_by_pixel() -> None:
    image = Made(1).image
    made = sheet({"a": [image]})
    shown = made[2:66, -66:-2]
    assert np.array_equal(shown[::4, ::4], image)
    assert np.array_equal(shown[3::4, 3::4], image)
