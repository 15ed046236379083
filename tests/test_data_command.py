"""`diffusion data ...` on real datasets: what is said, what is written, what is refused."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from typer.testing import CliRunner

from diffusion.data.datasets import Dataset, set_latest
from diffusion.data.images import encode_png
from diffusion.data.ingest import shard_dataset
from diffusion.presets import PRESETS
from diffusion.recipe import ShardRecipe
from diffusion.store import works
from diffusion.store.storage import LocalFolder, open_storage
from flows.cli import app
from flows.cli_data import data_root
from flows.command import named_dataset
from flows.preflight import check
from flows.site import Site
from tests.commands import command, on
from tests.made_dataset import Made, published
from tests.made_sources import fill

PICTURES = [
    Made(n, ("cats", "dogs")[n % 2], "holdout" if n > 11 else "train", (f"number {n}", f"the {n}th")[: n % 3])
    for n in range(14)
]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(home=tmp_path / "home", gpu=False)


@pytest.fixture
def root(site: Site) -> LocalFolder:
    return data_root(site)


@pytest.fixture
def diffusion(monkeypatch: pytest.MonkeyPatch, site: Site):
    """Runs `diffusion data ...` here; gives (exit code, what was said), and a ValueError is the answer."""
    on(site, monkeypatch, "cli_data", guards=("guarded", "looking"))
    return partial(command, "data")


@pytest.fixture
def made(root: LocalFolder) -> Dataset:
    dataset = published(root, PICTURES)
    set_latest(root, dataset.digest)
    return dataset


@pytest.mark.parametrize("command", ["list", "info", "lint", "preview", "diff", "mix"])
def test_every_command_has_help(command: str) -> None:
    done = CliRunner().invoke(app, ["data", command, "--help"])
    assert done.exit_code == 0
    assert "--home" in done.stdout


def test_info_tells_what_is_there(diffusion, made: Dataset) -> None:
    _, told = diffusion("info", "latest")
    assert re.search(rf"dataset +{made.digest}\n", told)
    assert "12 for training, 2 held out, of 14 files" in told
    assert "cats 6 + 1, dogs 6 + 1" in told
    size = sum(entry.bytes for entry in made.manifest.shards)
    assert f"4 with {size / 1000:.1f} kB" in told


def test_what_shards_prints_is_what_webdataset_takes(diffusion, made: Dataset) -> None:
    for split in ("train", "holdout"):
        _, told = diffusion("info", made.digest[:8], "--shards", split)
        keys = [sample["__key__"] for sample in webdataset.WebDataset(told.split(), shardshuffle=False)]
        assert keys == sorted(picture.key for picture in PICTURES if picture.split == split)
    with pytest.raises(ValueError, match="--shards all: the splits are train and holdout"):
        diffusion("info", "latest", "--shards", "all")


def test_versions_name_the_datasets_before_them(diffusion, root: LocalFolder, made: Dataset) -> None:
    child = published(root, PICTURES[1:], parent=made.digest)
    grandchild = published(root, PICTURES[2:], parent=child.digest)
    orphan = published(root, PICTURES[3:], parent="0" * 64)
    assert f"after      {child.digest[:16]} after {made.digest[:16]}\n" in diffusion("info", grandchild.digest)[1]
    assert f"after      {'0' * 16}, which is not here\n" in diffusion("info", orphan.digest)[1]
    _, told = diffusion("list")
    lines = {line.split()[0]: line for line in told.splitlines()[1:]}
    assert lines.keys() == {dataset.digest[:16] for dataset in (made, child, grandchild, orphan)}
    assert [name for name, line in lines.items() if "latest" in line] == [made.digest[:16]]
    assert lines[child.digest[:16]].endswith(f"after {made.digest[:16]}")


def test_info_tells_which_version_of_the_stage_made_how_many_shards(diffusion, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "grows"

    def more(first: int, count: int, version: int) -> str:
        for n in range(first, first + count):
            noise = np.random.default_rng(n).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            fill(folder, {f"a/{n}.png": encode_png(noise)})
        monkeypatch.setitem(works.STAGE_VERSIONS, "shard", version)
        recipe = ShardRecipe(resolution=8, shard_size=4, holdout=0)
        ref = shard_dataset(folder, recipe, tmp_path / "home" / "store")
        return re.search(r"made by +(.*)\n", diffusion("info", ref.digest)[1])[1]

    assert more(0, 8, 3) == "version 3 of the shard stage"
    assert more(8, 8, 4) == "version 3 of the shard stage, 2 shards; version 4 of the shard stage, 2 shards"
    assert more(16, 4, 4) == "version 3 of the shard stage, 2 shards; version 4 of the shard stage, 3 shards"


def test_a_damaged_manifest_does_not_hide_the_other_datasets(diffusion, root: LocalFolder, made: Dataset) -> None:
    root.put(f"datasets/{'0' * 16}/manifest.json", b"{")
    root.put("latest.json", b"{")
    _, told = diffusion("list")
    assert "latest.json, which says what latest is, is damaged" in told
    assert f"{'0' * 16}/manifest.json is damaged" in told
    assert made.digest[:16] in told


def test_what_only_looks_needs_no_home_that_can_be_written(root: LocalFolder, made: Dataset, tmp_path: Path) -> None:
    """The home's folder is a file: nothing can be written there, and no disk asked."""
    (tmp_path / "home2").write_text("")
    for words in (["list"], ["info", made.uri], ["diff", made.uri, made.uri], ["lint", made.uri]):
        done = CliRunner().invoke(app, ["data", *words, "--home", str(tmp_path / "home2")])
        assert done.exit_code == 0, done.output


def test_lint_passes_what_is_whole_and_names_what_is_not(diffusion, root: LocalFolder, made: Dataset) -> None:
    assert diffusion("lint", "latest") == (0, diffusion("lint", "latest")[1])
    entry = made.manifest.shards[0]
    row = np.load(root.path(entry.index))[2]
    data = bytearray(root.read(entry.tar))
    data[row["image_offset"] + 40] ^= 1
    root.put(entry.tar, bytes(data))
    code, told = diffusion("lint", "latest")
    assert code == 1
    assert f"{entry.tar}: has sha256" in told
    assert f"{entry.tar}, key {row['key'].decode()}: the picture differs" in told
    assert "make them again with `diffusion shard`" in told


def test_a_caption_commands_no_terminal(diffusion, root: LocalFolder) -> None:
    made = published(root, [Made(1, captions=("\x1b[31mred\x07\n and \x9b2J\x00more",))])
    _, told = diffusion("preview", made.digest)
    assert "1.png  \\x1b[31mred\\x07 and \\x9b2J\\x00more\n" in told
    assert all(line.isprintable() for line in told.splitlines())


def test_a_preview_is_a_sheet_and_its_captions_and_overwrites_nothing(
    diffusion, made: Dataset, site: Site, tmp_path: Path
) -> None:
    target = tmp_path / "sheet.png"
    _, told = diffusion("preview", "latest", "--n", "3", "--out", str(target))
    by_key = {picture.key: picture for picture in PICTURES}
    shown = [by_key[key] for key in re.findall(r"\b[0-9a-f]{32}\b", told)]
    assert [picture.label for picture in shown] == ["cats"] * 3 + ["dogs"] * 3
    assert all(picture.split == "train" for picture in shown)
    lines = {line.split()[0]: line for line in told.splitlines() if line.startswith("  ")}
    told_of = ("", "  number {0}", "  number {0} (weight 1); the {0}th (weight 1)")
    assert all(
        lines[picture.key].endswith(f"{picture.look}.png{told_of[len(picture.captions)].format(picture.look)}")
        for picture in shown
    )
    assert {len(picture.captions) for picture in shown} == {0, 1, 2}
    sheet = np.array(Image.open(target).convert("RGB"))
    assert all(holds(sheet, picture.image.repeat(4, axis=0).repeat(4, axis=1)) for picture in shown)
    with pytest.raises(ValueError, match="exists, and no file is overwritten"):
        diffusion("preview", "latest", "--out", str(target))
    diffusion("preview", "latest", "--label", "dogs")
    assert len(list((site.home / "previews").iterdir())) == 1


def holds(sheet: np.ndarray, image: np.ndarray) -> bool:
    height, width = image.shape[:2]
    corners = np.argwhere((sheet == image[0, 0]).all(axis=-1))
    return any(np.array_equal(sheet[y : y + height, x : x + width], image) for y, x in corners)


def test_a_diff_is_told_in_counts_and_names(diffusion, root: LocalFolder, made: Dataset) -> None:
    changed = PICTURES[1]._replace(label="birds")
    other = published(root, [changed, *PICTURES[2:], Made(50, "cats")])
    _, told = diffusion("diff", made.digest[:6], other.digest[:6])
    assert re.search(r"new class +birds", told)
    assert re.search(r"added +1 pictures\n +\w{32}  cats/50.png", told)
    assert re.search(r"removed +1 pictures\n +\w{32}  cats/0.png", told)
    assert re.search(r"changed +1 pictures\n +\w{32}  birds/1.png  class dogs -> birds", told)
    assert "between training and held out" not in told
    _, told = diffusion("diff", "latest", "latest")
    assert re.search(r"shared +4 shards", told)
    assert told.count(" 0 pictures") == 3


def test_a_mixture_is_published_and_becomes_the_latest(diffusion, root: LocalFolder, made: Dataset) -> None:
    other = published(root, [Made(n, "dogs") for n in range(60, 65)])
    _, told = diffusion("mix", f"{made.digest[:8]}=3", f"{other.uri}=0.5")
    assert f"{made.digest[:16]} with weight 3" in told
    assert f"{other.digest[:16]} with weight 0.5" in told
    _, told = diffusion("info", "latest")
    assert "17 for training, 2 held out, of 19 files" in told
    assert "mixture of 2" in diffusion("list")[1]
    for wrong in ("latest", "latest=", "latest=x", "=3", "latest=-1"):
        with pytest.raises(ValueError, match="give a dataset and its weight, as in"):
            diffusion("mix", wrong, "latest=1")


def test_the_folder_of_a_dataset_elsewhere_will_do(diffusion, tmp_path: Path) -> None:
    far = published(open_storage(tmp_path / "far"), PICTURES)
    assert far.digest in diffusion("info", far.uri)[1]
    assert diffusion("lint", far.uri)[0] == 0


def test_a_report_tells_of_captions(diffusion, root: LocalFolder) -> None:
    published(root, PICTURES, report={"captions": {"pictures_with": 7, "several": 2}})
    dataset = next(root.walk("datasets/")).name.split("/")[1]
    assert "7 pictures have one, 2 of them several" in diffusion("info", dataset)[1]
    assert json.loads(root.read(f"datasets/{dataset}/report.json"))["captions"]["several"] == 2


def test_a_stage_goes_on_from_a_dataset_that_is_named(site: Site, made: Dataset, root: LocalFolder) -> None:
    recipe = PRESETS["smoke"]()
    assert named_dataset(None, "embedded", site) is None
    assert named_dataset("latest", None, site) == made.manifest.ref(made.uri)
    with pytest.raises(ValueError, match="--source embedded and --dataset latest: give one of the two"):
        named_dataset("latest", "embedded", site)
    unjudged = published(root, PICTURES[:3])
    with pytest.raises(ValueError, match=f"dataset {unjudged.digest[:16]} holds no pictures out"):
        check(recipe, "embedded", "register", site, unjudged.whole())
    root.remove(made.manifest.shards[0].tar)
    with pytest.raises(ValueError, match="is missing"):
        named_dataset("latest", None, site)


@pytest.mark.parametrize("command", ["train", "evaluate", "register", "run"])
def test_every_stage_after_the_first_takes_a_dataset(command: str) -> None:
    assert "--dataset" in CliRunner().invoke(app, [command, "--help"]).stdout
