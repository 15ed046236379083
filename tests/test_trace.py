"""`diffusion trace`: a picture of a model that was really trained, back to its training pictures; and with links missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.data.images import decode_png
from diffusion.data.mix import mix
from diffusion.data.reader import ShardReader
from diffusion.data.reading_order import order_of
from diffusion.evaluation.extractors.features import efficientnet_lite0
from diffusion.evaluation.reference import ReferenceIdentity, path_of
from diffusion.lineage import chain
from diffusion.lineage.chain import Data, Missing, find_data, find_run, first_seen, key_of, missing_shards, seen_by
from diffusion.lineage.nearest import known, search
from diffusion.recipe import EvaluateRecipe, Recipe
from diffusion.serving.receipt import opened, stamp
from diffusion.store.bundle_spec import BundleSpec, read_spec
from diffusion.store.storage import LocalFolder
from flows.site import Site
from tests.commands import command, on
from tests.made_dataset import Made, published
from tests.traced_home import KEY, bundle_in, make_home, run_of

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, emoji_folder: Path, tiny_recipe: Recipe) -> Path:
    """A home with a dataset of sixty emoji, a run of two steps on them, its bundle, and a picture drawn with it."""
    home = tmp_path_factory.mktemp("home")
    make_home(home, emoji_folder, tiny_recipe)
    told = diffusion(
        home, "sample", "--bundle", bundle_in(home), "--label", "flags", "--n", 2, "--seed", 4, "--out", home / "out"
    )
    assert told[0] == 0
    return home


def diffusion(home: Path, *arguments: object) -> tuple[int, str]:
    """Runs a command here; its ValueError is the answer.  Returns exit code and what it said."""
    with pytest.MonkeyPatch.context() as patch:
        on(Site(home=home, gpu=False), patch, "cli_pictures")
        on(Site(home=home, gpu=False), patch, "cli_lineage", guards=("reading",))
        return command(*arguments)


@pytest.fixture
def picture(home: Path) -> Path:
    return home / "out" / "flags-4-001.png"


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    """The same home, to break."""
    return Path(shutil.copytree(home, tmp_path / "copy"))


def spec_of(home: Path) -> BundleSpec:
    return read_spec(bundle_in(home), None)[0]


def data_of(home: Path) -> Data:
    return find_data(LocalFolder(home / "store"), spec_of(home).dataset_digest)


def test_every_link_is_named_by_its_digest(home: Path, picture: Path, tmp_path: Path, emoji_folder: Path) -> None:
    code, told = diffusion(home, "trace", picture, "--all", "--picture", tmp_path / "near.png")
    assert code == 0
    run, spec, data = run_of(home), spec_of(home), data_of(home)
    made = data.manifest
    receipt = opened(picture.read_bytes()).receipt
    for digest in (receipt.bundle_digest, run.digest, spec.recipe_digest, run.dataset.digest):
        assert digest in told
    assert all(entry.sha256 in told for entry in made.entries("train"))
    assert f"made of {emoji_folder}" in told.replace("file://", "")
    keys = ShardReader(run.dataset.uri, cache_mib=0).keys
    assert all(key in told for key in keys)
    # two steps of 8 pictures: the keys that the reading order gives, nobody having seen the others
    seen = {keys[i] for i in order_of(made, "train", run_recipe(home)).at(0, 16).tolist()}
    assert f"the run has seen {len(seen)} of the pictures" in told
    assert decode_png((tmp_path / "near.png").read_bytes()).shape == (4 + 132, 4 + 4 * 132, 3)
    assert f"of {len(keys)} training pictures, in features of efficientnet-lite0" in told
    assert "! " not in told


def test_the_shards_that_were_seen_first_are_shown(home: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.trace._FIRST", 2)
    data = data_of(home)
    entries = data.manifest.entries("train")
    first = first_seen(data, run_recipe(home), 16, 2)
    assert first != (0, 1), "else this shows nothing"
    code, told = diffusion(home, "trace", picture, "--nearest", 0)
    assert code == 0
    assert [line.split()[1] for line in told.splitlines() if " of them" in line] == [entries[i].sha256 for i in first]
    assert "shards, first of these" in told


def run_recipe(home: Path):
    return find_run(home / "store", spec_of(home)).facts.recipe


def test_shards_are_seen_as_the_reading_order_says(home: Path) -> None:
    data, recipe = data_of(home), run_recipe(home)
    reader = ShardReader(data.uri, cache_mib=0)
    for count in (1, 5, 16, len(reader), 3 * len(reader) + 1):
        order = order_of(data.manifest, "train", recipe).at(0, count)
        seen = seen_by(data, recipe, count)
        assert seen.pictures == len(set(order.tolist()))
        assert seen.shards == set(reader.shards_of(order).tolist())
        often = np.bincount(order, minlength=len(reader))
        assert seen.times == (often.min(), often.max())
        in_turn = tuple(dict.fromkeys(reader.shards_of(order).tolist()))
        for few in (1, 3, 1_000):
            assert first_seen(data, recipe, count, few) == in_turn[:few]


def test_of_a_mixture_likewise(tmp_path: Path, tiny_recipe: Recipe) -> None:
    root = LocalFolder(tmp_path)
    pictures = [[Made(look) for look in range(5)], [Made(look) for look in range(100, 109)]]
    first, second = (published(root, [*own, Made(own[0].look + 50, split="holdout")]) for own in pictures)
    data = find_data(root, mix(root, [(first, 3.0), (second, 1.0)]).digest)
    reader = ShardReader(data.uri, cache_mib=0)
    for count in (1, 4, 9, 40):
        order = order_of(data.manifest, "train", tiny_recipe.train).at(0, count)
        seen = seen_by(data, tiny_recipe.train, count)
        assert (seen.pictures, seen.times) == (len(set(order.tolist())), None)
        in_turn = tuple(dict.fromkeys(reader.shards_of(order).tolist()))
        assert first_seen(data, tiny_recipe.train, count, 2) == in_turn[:2]
        assert seen.shards == set(reader.shards_of(order).tolist())


def test_a_key_leads_to_the_file_it_was(home: Path, emoji_folder: Path) -> None:
    data = data_of(home)
    reader = ShardReader(data.uri, cache_mib=0)
    for i in (0, 17, len(reader) - 1):
        key = key_of(data, i)
        sample = reader.read(i)
        assert (key.key, key.label) == (sample.key, data.manifest.classes[sample.label])
        assert (emoji_folder / key.source).is_file()
        assert key.source.startswith(key.label)


def test_the_nearest_of_a_training_picture_is_itself(home: Path, tmp_path: Path) -> None:
    reader = ShardReader(data_of(home).uri, cache_mib=0)
    found = search(reader.read(5).image, reader, tmp_path, count=3)
    assert (found.near[0].picture, found.near[0].distance) == (5, 0.0)
    assert found.compared == len(reader)
    extract = efficientnet_lite0(resolution=EvaluateRecipe().extractor_resolution)
    pictures = np.stack([reader.read(i).image for i in range(len(reader))])
    features = extract(torch.from_numpy(pictures)).numpy()
    distances = np.linalg.norm(features.astype(np.float64) - features[5], axis=1)
    assert [near.picture for near in found.near] == np.argsort(distances)[:3].tolist()
    assert [near.distance for near in found.near] == pytest.approx(np.sort(distances)[:3])
    assert found.typical == pytest.approx(np.median(distances), rel=0.05)


def test_a_side_that_cannot_be_written_is_said_before_anything_is_looked_for(home: Path, picture: Path) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        diffusion(home, "trace", picture, "--picture", picture / "near.png")


def test_features_are_computed_once_and_a_damaged_file_is_passed_over(home: Path, tmp_path: Path) -> None:
    reader = ShardReader(data_of(home).uri, cache_mib=0)
    told: list[int] = []

    def look() -> tuple:
        return search(reader.read(5).image, reader, tmp_path, count=2, progress=lambda done, _: told.append(done))

    first = look()
    assert told[-1] == len(reader)
    told.clear()
    assert (look(), told) == (first, [])
    (identity,) = known(tmp_path, reader.manifest.digest)
    assert isinstance(identity, ReferenceIdentity)
    path = path_of(tmp_path, identity)
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    assert look() == first
    assert told
    assert list(known(tmp_path, "e" * 64)) == []


def test_what_is_missing_is_said_and_the_rest_still_followed(copy: Path, tmp_path: Path) -> None:
    picture = copy / "out" / "flags-4-001.png"
    shutil.move(copy / "store" / "runs", tmp_path / "runs")
    code, told = diffusion(copy, "trace", picture, "--nearest", "0")
    assert code == 1
    assert f"checkpoint {run_of(copy).digest[:16]} is not in {copy}/store/runs" in told
    assert "or where that has DIFFUSION_RUNS" in told
    assert "training pictures and" in told
    # where checkpoints are copied to, it is found
    site = Site(home=copy, gpu=False, runs=str(tmp_path))
    assert find_run(site.store, spec_of(copy), site.runs).uri.startswith(str(tmp_path))

    data = data_of(copy)
    (gone, cut, *_) = data.manifest.entries("train")
    data.root.path(gone.tar).unlink()
    cut_tar = data.root.path(cut.tar)
    data_of_cut = cut_tar.read_bytes()[:-512]
    cut_tar.unlink()
    cut_tar.write_bytes(data_of_cut)
    assert missing_shards(data) == [gone.tar, cut.tar]
    code, told = diffusion(copy, "trace", picture, "--nearest", "0")
    assert code == 1
    assert f"{gone.tar} is missing or cut off" in told
    shutil.rmtree(copy / "store" / "datasets")
    code, told = diffusion(copy, "trace", picture)
    assert code == 1
    assert "or where that has DIFFUSION_DATA" in told


def test_behind_a_damaged_model_is_followed_what_it_or_the_receipt_still_says(copy: Path) -> None:
    picture, run = copy / "out" / "flags-4-001.png", run_of(copy)

    def told(*said: str, nearest: int = 0) -> str:
        code, told = diffusion(copy, "trace", picture, "--nearest", nearest)
        assert code == 1
        for part in (*said, f"checkpoint {run.digest}", f"dataset {run.dataset.digest}", "the run has seen"):
            assert part in told
        return told

    folder, spec = bundle_in(copy), spec_of(copy)
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    facts = f"{spec.parameters / 1e6:.2f} M parameters"
    assert "those that the receipt names" not in told(f"{weights}: sha256", facts)
    path = folder / "bundle.json"
    path.write_bytes(path.read_bytes()[:-1])
    trust = "run and data are those that the receipt names"
    assert facts not in told("is the bundle", trust)
    shutil.rmtree(copy / "store" / "bundles")
    assert "training pictures, in features of" in told("is neither in", trust, nearest=1)
    # where the run is of another dataset than the receipt says, neither is believed
    with pytest.raises(Missing, match="than the receipt says"):
        find_run(copy / "store", opened(picture.read_bytes()).receipt.model_copy(update={"dataset_digest": "e" * 64}))
    (copy / "store" / "runs" / KEY / "checkpoints" / f"{run.images_seen:012d}" / "state.json").unlink()
    assert diffusion(copy, "trace", picture, "--nearest", 0)[1].count("state.json is gone") == 1


def test_damaged_shards_are_named_and_the_others_still_said(copy: Path) -> None:
    picture, data = copy / "out" / "flags-4-001.png", data_of(copy)
    index = data.root.path(data.manifest.entries("train")[1].index)
    index.write_bytes(index.read_bytes()[:-1] + b"?")
    code, told = diffusion(copy, "trace", picture, "--all", "--nearest", 0)
    assert code == 1
    assert f"{index} differs from the manifest's sha256" in told.replace("file://", "")
    assert all(entry.sha256 in told for entry in data.manifest.entries("train"))


def test_a_run_that_was_edited_is_not_believed(copy: Path) -> None:
    spec = spec_of(copy)
    (state,) = (copy / "store").glob(f"runs/*/checkpoints/{run_of(copy).images_seen:012d}/state.json")
    state.write_bytes(state.read_bytes().replace(b'"threads":', b'"threads": '))
    with pytest.raises(Missing, match=r"state.json differs from its manifest"):
        find_run(copy / "store", spec)
    state.write_bytes(state.read_bytes().replace(b'"threads": ', b'"threads":'))
    with pytest.raises(Missing, match="of another recipe or dataset"):
        find_run(copy / "store", spec.model_copy(update={"recipe_digest": "e" * 64}))
    assert find_run(copy / "store", spec).facts.images_seen == spec.images_seen


def test_a_receipt_that_names_another_run_is_told(home: Path, picture: Path, tmp_path: Path) -> None:
    found = opened(picture.read_bytes())
    forged = tmp_path / "forged.png"
    forged.write_bytes(stamp(found.picture, found.receipt.model_copy(update={"run_digest": "e" * 64})))
    code, told = diffusion(home, "trace", forged, "--nearest", "0")
    assert code == 1
    assert "the receipt names another run than its bundle does: it was edited" in told
    assert f"checkpoint {run_of(home).digest}" in told


def test_a_changed_picture_is_traced_and_told(home: Path, picture: Path, tmp_path: Path) -> None:
    found = opened(picture.read_bytes())
    changed = tmp_path / "changed.png"
    changed.write_bytes(stamp(255 - found.picture, found.receipt))
    code, told = diffusion(home, "trace", changed, "--nearest", "0")
    assert code == 1
    assert "its pixels were changed after it was drawn" in told
    assert f"dataset {run_of(home).dataset.digest}" in told


def test_models_behind_a_model_are_named_as_far_as_they_are_there(home: Path) -> None:
    spec = spec_of(home)
    _, digest = read_spec(bundle_in(home), None)
    later = spec.model_copy(update={"init": digest})
    assert [(how, found) for how, found, _ in chain.origins(home / "store", later)] == [("started from", digest)]
    ((_, _, facts),) = chain.origins(home / "store", later)
    assert facts == spec
    ((_, _, facts),) = chain.origins(home / "store", spec.model_copy(update={"init": "e" * 64}))
    assert facts is None


def test_in_a_home_that_may_only_be_read_all_is_told(copy):
    """What is computed, the features of the training pictures, is not kept then."""
    shutil.rmtree(copy / "store" / "features", ignore_errors=True)
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    trace = [sys.executable, "-c", "from flows.cli import main; main()", "trace", copy / "out" / "flags-4-001.png"]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, copy, *trace],
        cwd=ROOT,
        env=os.environ | {"DIFFUSION_HOME": str(copy), "DIFFUSION_GPU": "false"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no read-only folder can be had here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "  nearest    of " in done.stdout
    assert not (copy / "store" / "features").exists()
