"""The report on a dataset: every count of the manifest, and pictures that are in it."""

import re
from pathlib import Path

import numpy as np
import pytest

from diffusion.data import ingest
from diffusion.data.datasets import Dataset, opened
from diffusion.data.images import decode_png
from diffusion.data.mix import mix
from diffusion.data.report import ASIDE, PICTURES, Original, amount, aside_rows, bars, write_report
from diffusion.store.storage import LocalFolder, open_storage
from flows.artifact import with_pictures
from tests.flawed_source import GOOD, REASONS, RECIPE, fill, picture


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("flawed")
    return opened(ingest.shard_dataset(fill(folder / "source"), RECIPE, folder / "root").uri)


def test_the_page_has_every_count_and_a_reason_for_every_file(made: Dataset) -> None:
    page = write_report(made)
    assert open_storage(made.uri).read("report.md").decode() == page
    manifest = made.manifest
    assert f"{manifest.images} for training, {manifest.holdout} held out, of {GOOD + len(REASONS)} files" in page
    for name, train, held in zip(manifest.classes, manifest.train_counts, manifest.holdout_counts, strict=True):
        assert f"| {name} | {train} | {held} |" in page
    for name, kind in REASONS.items():
        count = list(REASONS.values()).count(kind)
        assert re.search(rf"\| {kind} \| {count} \| .*{re.escape(name)}: ", page)
    assert "| .png | 30 |\n| .jpg | 1 |" in page
    assert re.search(rf"32- +{GOOD} █{{40}}\n", page)
    assert f"`diffusion data quarantine list {made.digest[:16]}`" in page


def test_the_sheets_show_pictures_of_each_class_and_reason(made: Dataset) -> None:
    write_report(made)
    pictures, aside = (decode_png(open_storage(made.uri).read(name)) for name in (PICTURES, ASIDE))
    assert pictures.shape[0] == 2 * (64 + 2) + 2
    assert aside.shape[0] == 5 * (64 + 2) + 2  # duplicates are in the shards
    page = with_pictures(made.uri, "report.md")
    assert page.count("(data:image/jpeg;base64,") == 2
    assert ".png)" not in page


def test_what_cannot_be_shown_is_crossed_and_the_rest_shown_whole() -> None:
    rows = aside_rows([Original("a", None), Original("a", b"no picture"), Original("b", picture(1, 64, 16))], 32)
    assert np.array_equal(rows["a"][0], rows["a"][1])
    assert rows["a"][0][16, 16].tolist() != rows["a"][0][16, 8].tolist()
    light, shown = rows["b"][0][0, 0], rows["b"][0]
    filled = (shown != light).any(axis=-1)
    assert (filled.any(axis=1).sum(), filled.any(axis=0).sum()) == (8, 32)  # 64 x 16 at half its size
    tiny = aside_rows([Original("c", picture(2, 5, 4))], 32)["c"][0]
    assert (tiny != light).any(axis=-1).sum() == 20  # at its own size


def test_a_mixture_shows_what_its_parts_set_aside(made: Dataset, tmp_path: Path) -> None:
    source = fill(tmp_path / "other")
    for path in sorted(source.rglob("[0-9]*.png"))[:4]:
        path.unlink()
    root = LocalFolder(Path(made.root.uri))
    mixed = mix(root, [(made, 2), (opened(ingest.shard_dataset(source, RECIPE, root).uri), 1)])
    page = write_report(mixed)
    assert "| too small | 4 |" in page
    assert "quarantine list" not in page
    assert open_storage(mixed.uri).size(ASIDE)


def test_figures_for_people() -> None:
    assert [amount(n) for n in (0, 999, 1_000, 2_500_000, 10**9, 3 * 10**15)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "2.5 MB",
        "1.0 GB",
        "3,000.0 TB",
    ]
    assert bars({"16": 1, "1.5": 80, "2": 0}) == [
        f"     1.5- {80:>9} {'█' * 40}",
        f"       2- {0:>9} ",
        f"      16- {1:>9} █",
    ]
