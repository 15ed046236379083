"""Which dataset a person means, and what may be said of it."""

from pathlib import Path

import pytest

from diffusion.data import manifest
from diffusion.data.datasets import by_time, find
from diffusion.data.stream import ShardReader
from diffusion.store.storage import LocalFolder
from tests.made_dataset import Made, published


@pytest.fixture
def root(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "root")


def test_any_way_to_say_it_finds_it(root: LocalFolder) -> None:
    made = published(root, [Made(1), Made(2)])
    digest = made.manifest.digest
    for ref in (digest[:4], digest[:16], digest[:17], digest, made.uri, made.uri + "/", "latest"):
        assert find(root, ref) == made
    assert find(LocalFolder(root.folder / "elsewhere"), made.uri) == made
    assert made.whole() == made.manifest.ref(made.uri)
    assert len(ShardReader(made.whole().uri)) == 2


def test_the_latest_is_the_one_published_last(root: LocalFolder) -> None:
    days = ["2026-03-01T00:00:00Z", "2026-03-03T00:00:00Z", "2026-03-02T00:00:00Z"]
    made = [published(root, [Made(n)], report={"published": day}) for n, day in enumerate(days)]
    undated = published(root, [Made(9)])
    assert by_time(root) == [undated, made[0], made[2], made[1]]
    assert find(root, "latest") == made[1]


def test_an_unknown_one_tells_what_there_is(root: LocalFolder) -> None:
    for ref in ("latest", "abcd"):
        with pytest.raises(ValueError, match=r"There is none in .*root: make one with `diffusion shard"):
            find(root, ref)
    made = published(root, [Made(1)])
    other = "0" * 16 if made.digest[0] != "0" else "1" * 16
    for ref, says in (
        (other, f"begins with {other}"),
        (made.digest[:3], "4 or more digits"),
        ("lastest", "the word latest"),
    ):
        with pytest.raises(ValueError, match=says) as refused:
            find(root, ref)
        assert made.digest[:16] in str(refused.value)
    with pytest.raises(ValueError, match="holds no dataset"):
        find(root, str(root.folder))
    with pytest.raises(ValueError, match="begins with"):
        find(root, made.digest[:20] + "0" * 44)  # the place is that of another digest


def test_digits_that_two_datasets_share_are_not_enough(root: LocalFolder) -> None:
    made = published(root, [Made(1)])
    twin = manifest.place_of(made.digest[:4] + "0" * 60)
    root.put(f"{twin}/{manifest.FILE}", root.read(f"{manifest.place_of(made.digest)}/{manifest.FILE}"))
    with pytest.raises(ValueError, match="first digits of 2 datasets: give more"):
        find(root, made.digest[:4])


def test_a_dataset_that_is_not_whole_is_handed_to_no_stage(root: LocalFolder) -> None:
    made = published(root, [Made(1)])
    root.remove(made.manifest.shards[0].tar)
    with pytest.raises(ValueError, match="is missing"):
        made.whole()
