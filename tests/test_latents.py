"""Latents of a dataset: found to the bit or computed to the same bits, and a run on them is the same run either way."""

import io
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion.codec import Codec, CodecIdentity, drawn
from diffusion.data import ingest, latents, manifest, reader
from diffusion.data.latents import Latents, encoded, open_latents, shape_of, write_latents
from diffusion.data.precompute import Maker, in_process, missing, precompute
from diffusion.data.precomputed import Computation, DamagedSidecar, computation_of
from diffusion.data.reader import ShardReader
from diffusion.data.reading_order import order_of
from diffusion.data.stream import Batch, batches
from diffusion.recipe import ShardRecipe, TrainRecipe
from diffusion.store.codecs import codec_named, identity_for
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import LocalFolder
from diffusion.training import checkpoint
from diffusion.training.corrupt import corrupt
from diffusion.training.step import TrainState, build_state, train_step
from tests.published import samples_of
from tests.sidecars import in_a_root_of_its_own, sidecar_files
from tests.small_codec import CHANNELS, FACTOR, VARIABLE, drawing_latents, saved

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 16
SHARD = "5" * 64
IDENTITY = CodecIdentity(name="autoencoder-kl", digest="0" * 64, channels=2, factor=2, scaling=1.0, shift=0.0)
BY = Computation(encoder=IDENTITY, device="cpu")
SHAPE = shape_of(IDENTITY, 8)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("codecs")


@pytest.fixture(autouse=True)
def _codec(folders, monkeypatch) -> None:
    folder = folders / "0"
    monkeypatch.setenv(VARIABLE, str(folder if folder.exists() else saved(folder)))


@pytest.fixture
def recipe(tiny_recipe) -> TrainRecipe:
    unet = tiny_recipe.train.unet.model_dump() | {"stem": 1}
    return drawing_latents(tiny_recipe.train, unet=unet, images=32, checkpoint_images=16)


@pytest.fixture
def codec(recipe) -> Codec:
    return codec_named(identity_for(recipe))


@pytest.fixture(scope="module")
def sharded(emoji_folder, tmp_path_factory) -> DatasetRef:
    root = tmp_path_factory.mktemp("store")
    return ingest.shard_dataset(emoji_folder, ShardRecipe(resolution=SIDE, shard_size=8, holdout=0.2), root)


@pytest.fixture
def dataset(sharded, tmp_path) -> DatasetRef:
    return in_a_root_of_its_own(sharded, tmp_path)


def some(pictures: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((pictures, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize("pictures", [1, 7, 20_000])
def test_what_was_put_in_comes_out(tmp_path, pictures):
    """20,000 have a table longer than what is read at once."""
    root, values = LocalFolder(tmp_path), some(min(pictures, 50))
    rows = (values[i % len(values)] for i in range(pictures))
    target = tmp_path / BY.place(SHARD)
    target.parent.mkdir(parents=True)
    write_latents(target, BY, SHARD, rows, pictures=pictures, shape=SHAPE)
    sidecar = open_latents(root, BY, SHARD, SHAPE)
    for row in (0, pictures // 2, pictures - 1):
        assert sidecar.read(row).tobytes() == values[row % len(values)].tobytes()
    theirs = safetensors.numpy.load(target.read_bytes())  # an independent reader
    assert theirs["latents"].shape == (pictures, *SHAPE)
    assert theirs["latents"][-1].tobytes() == values[(pictures - 1) % len(values)].tobytes()
    assert open_latents(root, BY, "6" * 64, SHAPE) is None


class Far:
    """A storage that is no folder.  It counts requests."""

    def __init__(self, folder: Path) -> None:
        self.inner, self.uri, self.reads = LocalFolder(folder), "far", 0

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        self.reads += 1
        return self.inner.read(name, start, size)


def test_far_away_many_pictures_cost_one_request(tmp_path, monkeypatch):
    values, far = some(60), Far(tmp_path)
    for shard in (SHARD, "6" * 64):
        target = tmp_path / BY.place(shard)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_latents(target, BY, shard, values if shard == SHARD else -values, pictures=60, shape=SHAPE)
    size = target.stat().st_size
    for piece in (1_000, 2**22):
        monkeypatch.setattr(latents, "_PIECE", piece)
        far.reads, opened = 0, Latents(far, [SHARD, "6" * 64, "7" * 64], Codec(IDENTITY, None, None), 8)
        for row in (59, *range(60)):
            assert opened.find(0, row).tobytes() == values[row].tobytes()
            assert opened.find(1, row).tobytes() == (-values[row]).tobytes()
        assert far.reads == 2 * -(-size // piece)
        assert opened.find(2, 0) is None


@settings(deadline=None)  # it writes files
@given(data=st.data())
def test_a_damaged_file_gives_the_right_bits_or_is_named_never_others(tmp_path_factory, data):
    root, values = LocalFolder(tmp_path_factory.mktemp("root")), some(3)
    target = root.path(BY.place(SHARD))
    target.parent.mkdir(parents=True)
    write_latents(target, BY, SHARD, values, pictures=3, shape=SHAPE)
    written = bytearray(target.read_bytes())
    cut = data.draw(st.booleans())
    if cut:
        del written[data.draw(st.integers(0, len(written) - 1)) :]
    else:
        written[data.draw(st.integers(0, len(written) - 1))] ^= data.draw(st.integers(1, 255))
    target.write_bytes(written)
    refused = []
    for row in range(3):
        try:
            assert open_latents(root, BY, SHARD, SHAPE).read(row).tobytes() == values[row].tobytes()
        except DamagedSidecar as error:
            refused.append(str(error))
    assert all(BY.place(SHARD) in reason and "Remove it" in reason and "\n" not in reason for reason in refused)
    assert refused or not cut


def test_a_name_says_all_that_the_content_depends_on():
    changes = {"digest": "1" * 64, "channels": 3, "factor": 4, "scaling": 0.5, "shift": 0.1, "name": "other"}
    others = [IDENTITY.model_copy(update={name: value}) for name, value in changes.items()]
    places = {Computation(encoder=identity, device="cpu").place(SHARD) for identity in (IDENTITY, *others)}
    places |= {BY.model_copy(update={"device": "cuda"}).place(SHARD), BY.place("6" * 64)}
    assert len(places) == 9


def test_every_shard_gets_one_of_its_own_pictures_in_their_order(dataset, codec):
    by = computation_of(codec)
    precompute(dataset, by)
    assert missing(dataset, by) == []
    made, root = sidecar_files(dataset), manifest.root_of(dataset.uri)
    rows: dict[str, int] = {}
    for sample in samples_of(dataset.uri):  # by tarfile and Pillow
        picture = np.array(Image.open(io.BytesIO(sample.image)))[None]
        row = rows.setdefault(sample.shard, 0)
        rows[sample.shard] += 1
        found = open_latents(root, by, sample.shard, shape_of(codec.identity, SIDE)).read(row)
        assert found.tobytes() == encoded(codec, picture)[0].tobytes()
    assert {by.place(shard) for shard in rows} == made.keys()

    def scattered(setup, entries):
        for entry in [*reversed(entries), entries[0]]:
            yield Maker(setup)(entry)

    for name in made:
        root.remove(name)
    precompute(dataset, by, each=scattered)
    assert sidecar_files(dataset) == made


def test_another_weight_is_another_folder_of_sidecars_and_only_what_is_missing_is_made(
    dataset, codec, recipe, tmp_path, monkeypatch
):
    precompute(dataset, computation_of(codec))
    before = sidecar_files(dataset)
    monkeypatch.setenv(VARIABLE, str(saved(tmp_path / "changed", seed=1)))
    other = computation_of(codec_named(identity_for(recipe)))
    assert len(missing(dataset, other)) == len(before)
    with pytest.raises(ValueError, match=f"here is autoencoder-kl {other.encoder.digest[:12]}"):
        precompute(dataset, Computation(encoder=codec.identity.model_copy(update={"digest": "1" * 64}), device="cpu"))
    precompute(dataset, other)
    after = sidecar_files(dataset)
    assert {name: after[name] for name in before} == before
    assert len(after) == 2 * len(before)
    manifest.root_of(dataset.uri).remove(other.place(manifest.load(dataset.uri).shards[0].sha256))
    asked = []

    def each(setup, entries):
        asked.extend(entries)
        return in_process(setup, entries)

    precompute(dataset, other, each=each)
    assert asked == [manifest.load(dataset.uri).shards[0]]


def test_a_shard_that_is_not_as_its_name_says_has_no_latents(dataset, codec):
    root, by = manifest.root_of(dataset.uri), computation_of(codec)
    entry = missing(dataset, by)[0]
    data = bytearray(root.read(entry.tar))
    data[600] ^= 1
    root.put(entry.tar, bytes(data))
    with pytest.raises(ValueError, match=rf"{entry.sha256}\.tar has sha256"):
        precompute(dataset, by)
    root.remove(entry.tar)
    with pytest.raises(ValueError, match=rf"{entry.sha256}\.tar is missing"):
        precompute(dataset, by)
    assert sidecar_files(dataset) == {}


def test_numbers_that_are_not_finite_are_not_kept(dataset, codec, recipe, tmp_path, monkeypatch):
    folder = saved(tmp_path / "nan")
    weights = safetensors.torch.load_file(folder / "diffusion_pytorch_model.safetensors")
    weights["quant_conv.bias"][:] = torch.nan
    safetensors.torch.save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    monkeypatch.setenv(VARIABLE, str(folder))
    with pytest.raises(ValueError, match="not finite for picture"):
        precompute(dataset, computation_of(codec_named(identity_for(recipe))))
    assert sidecar_files(dataset) == {}


def stream(dataset: DatasetRef, recipe: TrainRecipe, codec: Codec, **given) -> list[Batch]:
    opened = ShardReader(dataset.uri, codec=codec, **{k: given.pop(k) for k in ("max_damaged",) if k in given})
    order = order_of(opened.manifest, "train", recipe)
    return list(batches(opened, order, 8, stop=2 * len(opened) // 8 * 8, seed=recipe.seed, **given))


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return all(
        torch.equal(a.latents, b.latents)
        and (a.keys, a.captions) == (b.keys, b.captions)
        and torch.equal(a.label, b.label)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_with_sidecars_no_picture_is_decoded_and_nothing_else_is_different(dataset, codec, recipe, monkeypatch):
    computed = stream(dataset, recipe, codec, threads=0)
    assert computed[0].latents.shape == (8, *shape_of(codec.identity, SIDE))
    assert any(batch.captions[0] for batch in computed)
    precompute(dataset, computation_of(codec))

    def refuse(*_):
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(reader, "decode_into", refuse)
    unable = Codec(codec.identity, refuse, refuse)
    for threads in (0, 3):
        assert same(stream(dataset, recipe, unable, threads=threads), computed)


def test_a_missing_or_damaged_sidecar_costs_computing_and_is_told_once(dataset, codec, recipe):
    precompute(dataset, computation_of(codec))
    found, told = stream(dataset, recipe, codec), []
    root, by = manifest.root_of(dataset.uri), computation_of(codec)
    names = [by.place(entry.sha256) for entry in manifest.load(dataset.uri).entries("train")]
    table, value = (bytearray(root.read(name)) for name in names[:2])
    table[100] ^= 1
    value[-1] ^= 1
    root.put(names[0], bytes(table))
    root.put(names[1], bytes(value))
    root.remove(names[2])
    assert same(stream(dataset, recipe, codec, on_damage=told.append, threads=2), found)
    assert sorted(name in str(error) for error in told for name in names[:2]) == [False, False, True, True]


def test_a_damaged_picture_without_a_sidecar_has_a_substitute_and_with_one_needs_none(dataset, codec, recipe):
    sound = stream(dataset, recipe, codec)
    opened = ShardReader(dataset.uri)
    root, entry = opened.root, opened.entries[0]
    precompute(dataset, computation_of(codec))
    index = manifest.root_of(dataset.uri).read(entry.index)
    start = int(np.load(io.BytesIO(index))["image_offset"][0])
    tar = bytearray(root.read(entry.tar))
    tar[start + 60] ^= 1
    root.put(entry.tar, bytes(tar))
    assert same(stream(dataset, recipe, codec, max_damaged=0.1), sound)
    root.remove(computation_of(codec).place(entry.sha256))
    keys, told = opened.keys, []
    poor = stream(dataset, recipe, codec, max_damaged=0.1, on_damage=told.append)
    assert [damage.key for damage in told] == [keys[0]]
    for ours, theirs in zip(poor, sound, strict=True):
        for i, key in enumerate(theirs.keys):
            if key == keys[0]:
                assert ours.keys[i] == keys[1]
            else:
                assert (ours.keys[i], ours.latents[i].tolist()) == (key, theirs.latents[i].tolist())


def test_a_picture_at_a_position_has_one_latent_whatever_the_share(dataset, codec, recipe):
    opened = ShardReader(dataset.uri, codec=codec)
    order = order_of(opened.manifest, "train", recipe)
    batch = next(batches(opened, order, 8, threads=0))
    whole = corrupt(batch, recipe, 3, CPU).x0
    for world in (2, 4):
        parts = [next(batches(opened, order, 8, rank=rank, world=world)) for rank in range(world)]
        assert torch.equal(torch.cat([corrupt(part, recipe, 3, CPU).x0 for part in parts]), whole)
    assert torch.equal(whole, drawn(batch.latents, seed=recipe.seed, index=batch.index))
    later = next(batches(opened, order, 8, start=len(opened), threads=0))  # the same pictures in the next epoch
    again = corrupt(later, recipe, 3, CPU).x0
    for i, key in enumerate(later.keys):
        if key in batch.keys:
            assert not torch.equal(again[i], whole[batch.keys.index(key)])


def weights(state: TrainState) -> dict[str, bytes]:
    return {name: value.detach().numpy().tobytes() for name, value in state.net.named_parameters()}


def start_of(recipe: TrainRecipe, dataset: DatasetRef) -> TrainState:
    return build_state(recipe, resolution=dataset.resolution, classes=len(dataset.classes), device="cpu")


def trained(state: TrainState, dataset: DatasetRef, recipe: TrainRecipe, codec: Codec, stop: int) -> TrainState:
    opened = ShardReader(dataset.uri, codec=codec)
    order = order_of(opened.manifest, "train", recipe)
    for batch in batches(opened, order, recipe.batch_size, start=state.images_seen, stop=stop, seed=recipe.seed):
        train_step(state, batch, recipe)
    return state


def test_a_run_is_the_same_with_sidecars_without_and_resumed_in_between(dataset, codec, recipe, tmp_path):
    start = start_of(recipe, dataset)
    assert start.net.net.stem.weight.shape[1] == 9 * CHANNELS
    assert start.codec == codec.identity
    plain = trained(start_of(recipe, dataset), dataset, recipe, codec, 32)
    assert all(value != weights(start)[name] for name, value in weights(plain).items() if "head" in name)

    facts = checkpoint.facts_of(recipe, dataset, world=1, device=CPU, codec=start.codec)
    checkpoint.save(trained(start, dataset, recipe, codec, 16), tmp_path / "checkpoint", facts)
    precompute(dataset, computation_of(codec))
    resumed = start_of(recipe, dataset)
    assert checkpoint.load(tmp_path / "checkpoint", resumed, facts) == {}
    assert weights(trained(resumed, dataset, recipe, codec, 32)) == weights(plain)


def test_a_run_goes_on_with_its_own_codec_alone(dataset, codec, recipe, tmp_path, monkeypatch):
    state = start_of(recipe, dataset)
    facts = checkpoint.facts_of(recipe, dataset, world=1, device=CPU, codec=state.codec)
    checkpoint.save(state, tmp_path / "checkpoint", facts)
    monkeypatch.setenv(VARIABLE, str(saved(tmp_path / "changed", seed=1)))
    other = start_of(recipe, dataset)
    facts = checkpoint.facts_of(recipe, dataset, world=1, device=CPU, codec=other.codec)
    before = weights(other)
    with pytest.raises(ValueError, match=rf"codec .*{state.codec.digest[:12]}.*here is .*{other.codec.digest[:12]}"):
        checkpoint.load(tmp_path / "checkpoint", other, facts)
    assert weights(other) == before


def test_pictures_of_a_side_that_the_factor_does_not_divide_are_refused_at_the_door(codec, recipe):
    with pytest.raises(ValueError, match=f"divisible by {FACTOR}"):
        Latents(LocalFolder(Path()), [], codec, 18)
    with pytest.raises(ValueError, match=f"divisible by {FACTOR}"):
        build_state(recipe, resolution=18, classes=1, device="cpu")
