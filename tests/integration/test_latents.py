"""Latents through every real part: sharded, precomputed on Ray, trained, evaluated, registered, drawn; killed in between.

The run is in the exact mode, so what two workers come to, killed and all, is what this process comes to without Ray.
"""

import time
from pathlib import Path

import pytest
import torch

from diffusion.data import manifest
from diffusion.data.precompute import precompute
from diffusion.data.precomputed import Computation
from diffusion.data.reader import ShardReader
from diffusion.data.reading_order import order_of
from diffusion.data.stream import batches
from diffusion.recipe import TrainRecipe
from diffusion.serving.receipt import read_receipt
from diffusion.store.codecs import codec_identity, codec_named
from diffusion.store.refs import DatasetRef
from diffusion.threads import one_thread
from diffusion.training import checkpoint
from diffusion.training.loop import train
from diffusion.training.step import build_state, end_of
from tests.processes import kill
from tests.program import Place, running
from tests.small_codec import CHANNELS, FACTOR, VARIABLE, saved

SETTINGS = (
    "shard.shard_size=16",
    "train.codec=autoencoder-kl",
    f"train.codec_channels={CHANNELS}",
    f"train.codec_factor={FACTOR}",
    "train.unet.stem=1",
    "train.images=512",  # some seconds, to be killed in
    "train.checkpoint_images=128",
    "train.micro_batch=4",
    "gate.max_loss=1000000",  # of a few steps
)


class WithCodec(Place):
    """Whose environment names a codec."""

    def environment(self) -> dict[str, str]:
        return super().environment() | {VARIABLE: str(self.root / "codec")}


def line(command: str, source: Path, *arguments: str) -> tuple[str, ...]:
    settings = tuple(word for setting in SETTINGS for word in ("--set", setting))
    return (command, "--preset", "smoke", "--source", str(source), *settings, *arguments)


def done(place: Place, *arguments: str) -> str:
    with running(place, *arguments) as process:
        said = process.stdout.read()
        assert process.wait() == 0, said
    return said


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sidecars(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob("precomputed/*/*"))}


def trained_here(recipe: TrainRecipe, ref: DatasetRef, folder: Path) -> Path:
    """The last checkpoint, of one process and without a pause."""
    state = build_state(recipe, resolution=ref.resolution, classes=len(ref.classes), device="cpu")
    reader = ShardReader(ref.uri, digest=ref.digest, captions=False, codec=codec_named(state.codec, "cpu"))
    order = order_of(reader.manifest, "train", recipe)
    read = batches(reader, order, recipe.batch_size, start=0, stop=end_of(recipe), seed=recipe.seed)
    with one_thread():
        train(state, read, recipe)
        facts = checkpoint.facts_of(recipe, ref, world=1, device=torch.device("cpu"), codec=state.codec)
    checkpoint.save(state, folder, facts)
    return folder


@pytest.fixture
def machine(short_tmp: Path) -> WithCodec:
    root = short_tmp / "latents"
    root.mkdir()
    saved(root / "codec")
    return WithCodec(root)


def test_the_line_on_latents_killed_or_not_is_the_same(machine, emoji_folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(machine.root / "codec"))
    store = machine.home / "store"
    with running(machine, *line("run", emoji_folder, "--until", "register")) as process:
        end = time.monotonic() + 300
        while not list(store.glob("runs/*/checkpoints/*128")):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < end
            time.sleep(0.1)
        assert kill(*machine.processes())  # those of Ray too, which would go on for a while
    assert machine.wait_for_end() == []
    assert max(store.glob("runs/*/checkpoints/*")).name < f"{512:012d}"
    said = done(machine, *line("run", emoji_folder, "--until", "register"))
    assert "latents" in said
    assert "goes on from its checkpoint" in said

    (dataset,) = (store / "datasets").glob("*/manifest.json")
    ref: DatasetRef = manifest.load(dataset.parent).ref(str(dataset.parent))
    last = max(store.glob("runs/*/checkpoints/*"))
    assert files(last) == files(trained_here(checkpoint.read_facts(last).recipe, ref, tmp_path / "here"))

    by, made = Computation(encoder=codec_identity("autoencoder-kl"), device="cpu"), sidecars(store)
    for name in made:
        (store / name).unlink()
    precompute(ref, by)  # in this process
    assert sidecars(store) == made

    out = tmp_path / "out"
    done(machine, "sample", "--name", "smoke", "--label", "flags", "--n", "2", "--seed", "3", "--out", str(out))
    pictures = sorted(out.glob("flags-3-*.png"))
    assert len(pictures) == 2
    assert read_receipt(pictures[0].read_bytes()).dataset_digest == ref.digest

    saved(machine.root / "codec", seed=1)
    with running(machine, "sample", "--name", "smoke", "--seed", "3") as process:
        said = process.stdout.read()
        assert process.wait() == 2
    assert "it would make other pictures of the same latents" in " ".join(said.split())
    assert "Traceback" not in said
