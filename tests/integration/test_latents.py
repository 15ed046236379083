"""Latents through every real part: sharded, precomputed on Ray, trained, evaluated, registered, drawn; killed in between."""

import time
from pathlib import Path

import pytest

from diffusion.data import manifest
from diffusion.data.precompute import precompute
from diffusion.data.precomputed import Computation
from diffusion.serving.receipt import read_receipt
from diffusion.store.codecs import codec_identity
from diffusion.store.refs import DatasetRef
from tests.processes import kill
from tests.program import Place, running
from tests.small_codec import CHANNELS, FACTOR, VARIABLE, saved

SETTINGS = (
    "shard.shard_size=16",
    "train.codec=autoencoder-kl",
    f"train.codec_channels={CHANNELS}",
    f"train.codec_factor={FACTOR}",
    "train.unet.stem=1",
    "train.images=1024",  # some seconds, to be killed in
    "train.checkpoint_images=256",
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


def weights(place: Place) -> dict[str, bytes]:
    """Those of the last checkpoint."""
    (run,) = (place.home / "store" / "runs").iterdir()
    last = max((run / "checkpoints").iterdir())
    return {path.name: path.read_bytes() for path in last.glob("*.safetensors")}


def sidecars(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob("precomputed/*/*"))}


@pytest.fixture
def places(short_tmp: Path) -> list[Place]:
    made = []
    for name in ("whole", "killed"):
        root = short_tmp / f"l-{name}"
        root.mkdir()
        saved(root / "codec")
        made.append(WithCodec(root))
    return made


def test_the_line_on_latents_and_a_killed_run_is_the_same(places, emoji_folder: Path, tmp_path: Path, monkeypatch):
    whole, killed = places
    said = done(whole, *line("run", emoji_folder, "--until", "register"))
    assert "latents" in said
    assert not whole.strays()
    monkeypatch.setenv(VARIABLE, str(whole.root / "codec"))
    store = whole.home / "store"
    by, made = Computation(encoder=codec_identity("autoencoder-kl"), device="cpu"), sidecars(store)
    (dataset,) = (store / "datasets").glob("*/manifest.json")
    ref: DatasetRef = manifest.load(dataset.parent).ref(str(dataset.parent))
    for name in made:
        (store / name).unlink()
    precompute(ref, by)  # in this process
    assert sidecars(store) == made

    out = tmp_path / "out"
    done(whole, "sample", "--name", "smoke", "--label", "flags", "--n", "2", "--seed", "3", "--out", str(out))
    pictures = sorted(out.glob("flags-3-*.png"))
    assert len(pictures) == 2
    assert read_receipt(pictures[0].read_bytes()).dataset_digest == ref.digest

    done(killed, *line("shard", emoji_folder))
    assert sidecars(killed.home / "store") == made
    with running(killed, *line("train", emoji_folder)) as process:
        end = time.monotonic() + 300
        while not list((killed.home / "store").glob("runs/*/checkpoints/*256")):
            assert time.monotonic() < end
            time.sleep(0.1)
        assert kill(*killed.processes())  # those of Ray too, which would go on for a while
    assert killed.wait_for_end() == []
    assert max((killed.home / "store").glob("runs/*/checkpoints/*")).name < f"{1024:012d}"
    assert "goes on from its checkpoint" in done(killed, *line("train", emoji_folder))
    assert weights(killed) == weights(whole)

    saved(whole.root / "codec", seed=1)
    with running(whole, "sample", "--name", "smoke", "--seed", "3") as process:
        said = process.stdout.read()
        assert process.wait() == 2
    assert "it would make other pictures of the same latents" in " ".join(said.split())
    assert "Traceback" not in said
