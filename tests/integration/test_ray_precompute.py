"""Captions precomputed on real Ray: the same bytes as in one process; training finds them and comes to the same bits."""

from pathlib import Path

import pytest
import torch

from diffusion.adapters import ray_actors
from diffusion.adapters.ray_precompute import precompute_dataset
from diffusion.adapters.ray_train import train_run
from diffusion.data import ingest, manifest
from diffusion.data.precompute import captions_of, precompute
from diffusion.data.sidecar import Computation, Sidecars, sidecar_bytes
from diffusion.recipe import Recipe, ShardRecipe
from diffusion.store.refs import DatasetRef, RunRef
from diffusion.store.storage import open_storage
from diffusion.store.text_encoders import text_encoder, text_identity
from tests.processes import kill, our_actors
from tests.program import Place, running
from tests.sidecars import sidecar_files
from tests.words import reading

TOKENS, WIDTH = 20, 384


@pytest.fixture(scope="module")
def by() -> Computation:
    return Computation(encoder=text_identity("minilm", tokens=TOKENS), device="cpu")


@pytest.fixture
def datasets(emoji_folder, tmp_path):
    """Makes the same dataset in as many data roots as one likes."""

    def make(name: str) -> DatasetRef:
        return ingest.shard_dataset(
            emoji_folder, ShardRecipe(resolution=32, shard_size=8, holdout=0.2), tmp_path / name
        )

    return make


@pytest.mark.usefixtures("ray_local")
def test_any_number_of_actors_and_none_give_the_same_bytes(datasets, by, monkeypatch):
    monkeypatch.setattr(ray_actors, "_WAVE", 3)
    plain = datasets("plain")
    precompute(plain, by)
    assert len(sidecar_files(plain)) == len(manifest.load(plain.uri).shards)
    for actors in (1, 3):
        dataset, seen = datasets(str(actors)), []
        precompute_dataset(dataset, by, actors=actors, progress=lambda *state, seen=seen: seen.append(state))
        assert sidecar_files(dataset) == sidecar_files(plain)
        assert seen == sorted(seen)
        assert seen[-1] == (dataset.images + dataset.holdout,) * 2


@pytest.mark.usefixtures("ray_local")
def test_an_actor_killed_in_mid_work_changes_nothing(datasets, by):
    plain, dataset, killed = datasets("plain"), datasets("ray"), []
    precompute(plain, by)

    def kill_one(done: int, total: int) -> None:
        if not killed:
            killed.append(our_actors()[0])
            assert kill(*killed)

    precompute_dataset(dataset, by, actors=2, progress=kill_one)
    assert killed
    assert sidecar_files(dataset) == sidecar_files(plain)


@pytest.mark.usefixtures("ray_local")
def test_a_failure_has_its_cause(datasets, by):
    dataset = datasets("ray")
    tar = manifest.load(dataset.uri).shards[0].tar
    root = manifest.root_of(dataset.uri)
    root.put(tar, root.read(tar)[:-1])
    with pytest.raises(ValueError, match=f"{tar} differs") as error:
        precompute_dataset(dataset, by, actors=2)
    assert "captions_of" in "".join(error.value.__notes__)


@pytest.mark.usefixtures("ray_local")
def test_a_run_is_the_same_to_the_bit_with_sidecars_and_reads_them(datasets, by, tiny_recipe: Recipe, tmp_path: Path):
    recipe = reading(tiny_recipe.train, tokens=TOKENS, width=WIDTH).model_copy(update={"images": 48})
    dataset = datasets("data")
    root = manifest.root_of(dataset.uri)

    def trained(name: str) -> tuple[RunRef, list[dict]]:
        events: list[dict] = []
        return train_run(recipe, dataset, tmp_path / name, workers=2, on_event=events.append), events

    def weights(run: RunRef) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in Path(run.uri).glob("*.safetensors")}

    without, _ = trained("without")
    precompute(dataset, by)
    with_them, events = trained("with")
    assert weights(with_them) == weights(without)
    assert [event["event"] for event in events if "damaged" in event["event"]] == []

    entries = manifest.load(dataset.uri).entries("train")
    for entry in entries:  # well-formed sidecars with wrong numbers: they show whether anyone reads them
        wrong = {caption: torch.zeros(1, WIDTH).numpy() for caption in captions_of(root, entry)}
        root.put(by.place(entry.sha256), sidecar_bytes(by, entry.sha256, wrong))
    assert weights(trained("wrong")[0]) != weights(without)

    for entry in entries:
        root.put(by.place(entry.sha256), b"damaged")
    damaged, events = trained("damaged")
    assert weights(damaged) == weights(without)
    reasons = [event["reason"] for event in events if event["event"] == "damaged_sidecar"]
    assert 0 < len(reasons) == len(set(reasons)) <= len(entries)


def test_on_s3_they_are_the_same_bytes_and_a_request_a_shard_finds_them_all(datasets, by, s3):
    plain = datasets("plain")
    precompute(plain, by)
    local, bucket = manifest.root_of(plain.uri), s3.bucket()
    remote = open_storage(f"{bucket}/root")
    for prefix in ("shards", "datasets"):
        for found in local.walk(prefix):
            remote.put(found.name, local.path(found.name))
    dataset = plain.model_copy(update={"uri": f"{remote.uri}/{Path(plain.uri).relative_to(local.uri)}"})
    precompute(dataset, by)
    assert sidecar_files(dataset) == sidecar_files(plain)

    entries = manifest.load(dataset.uri).entries("train")
    encoder = text_encoder("minilm", tokens=TOKENS)
    sidecars = Sidecars(remote, [entry.sha256 for entry in entries], encoder, pytest.fail)
    before = len(s3.requests())
    for number, entry in enumerate(entries):
        sidecars.turn_to([number])
        for caption in captions_of(local, entry):
            text, mask = encoder([caption])
            assert torch.equal(sidecars.find(caption), text[0][mask[0]])
    after = s3.requests()[before:]
    assert [request.method for request in after] == ["GET"] * len(entries)


def test_shard_computes_the_captions_that_a_preset_reads_once(place: Place, emoji_folder: Path):
    small = ("shard.resolution=16", "shard.shard_size=16", "shard.holdout=0.2")
    line = ("shard", "--preset", "emoji-text", "--source", str(emoji_folder))
    line += tuple(word for setting in small for word in ("--set", setting))
    store, made = place.home / "store", []
    for _ in range(2):
        with running(place, *line) as process:
            said = process.stdout.read()
            assert process.wait() == 0, said
        assert ("✓ captions" in said) == (not made)  # the stage, not the fact in the summary
        made.append({path: path.stat().st_mtime_ns for path in (store / "precomputed").rglob("*.safetensors")})
    assert made[0] == made[1]
    assert {path.stem for path in made[0]} == {path.stem for path in (store / "shards").rglob("*.tar")}
