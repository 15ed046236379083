"""Which dataset a person means, and what may be said of it."""

from pathlib import Path

import pytest

from diffusion.data import manifest
from diffusion.data.datasets import REPORT, find, latest, places, set_latest
from diffusion.data.stream import ShardReader
from diffusion.store.storage import LocalFolder
from tests.made_dataset import Made, published


@pytest.fixture
def root(tmp_path: Path) -> LocalFolder:
    return LocalFolder(tmp_path / "root")


def test_any_way_to_say_it_finds_it(root: LocalFolder) -> None:
    made = published(root, [Made(1), Made(2)])
    set_latest(root, made.digest)
    digest = made.manifest.digest
    for ref in (digest[:4], digest[:16], digest[:17], digest, made.uri, made.uri + "/", "latest"):
        assert find(root, ref) == made
    assert find(LocalFolder(root.folder / "elsewhere"), made.uri) == made
    assert made.whole() == made.manifest.ref(made.uri)
    assert len(ShardReader(made.whole().uri)) == 2


def test_the_latest_is_the_one_that_was_said_to_be(root: LocalFolder) -> None:
    first, second = published(root, [Made(1)]), published(root, [Made(2)])
    for made in (second, first, second):
        set_latest(root, made.digest)
        assert find(root, "latest") == made
        assert latest(root) == made.digest
    assert places(root) == sorted([first.uri, second.uri])
    root.remove(f"{manifest.place_of(second.digest)}/{manifest.FILE}")
    with pytest.raises(ValueError, match=f"begins with {second.digest}") as refused:
        find(root, "latest")
    assert first.digest[:16] in str(refused.value)


def test_damaged_notes_are_named_and_hide_nothing_else(root: LocalFolder) -> None:
    made = published(root, [Made(1)])
    report = f"{manifest.place_of(made.digest)}/{REPORT}"
    for damage in (b"", b"[]", b'{"digesd": ""}', b'{"digest": "\xff"}', b"7"):
        root.put("latest.json", damage)
        with pytest.raises(ValueError, match=r"latest.json, which says what latest is, is damaged: .* remove it"):
            find(root, "latest")
        assert find(root, made.digest[:8]) == made
        set_latest(root, made.digest)
        assert find(root, "latest") == made
    root.put(report, b'{"a": ')
    with pytest.raises(ValueError, match=r"report.json, which has figures .* is damaged: remove it"):
        _ = find(root, "latest").report


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
    with pytest.raises(ValueError, match=f"2 datasets begin with {made.digest[:4]}, .*: give more digits"):
        find(root, made.digest[:4])


def test_a_dataset_that_is_not_whole_is_handed_to_no_stage(root: LocalFolder) -> None:
    made = published(root, [Made(1)])
    root.remove(made.manifest.shards[0].tar)
    with pytest.raises(ValueError, match="is missing"):
        made.whole()
