"""Sidecars: a caption's embedding is found to the bit, by nothing but its name, or is computed; never is it another's."""

import random

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from diffusion.data import ingest, manifest
from diffusion.data import sidecar as sidecar_module
from diffusion.data.order import Order
from diffusion.data.precompute import Maker, Setup, captions_of, in_process, missing, precompute
from diffusion.data.reading_order import order_of
from diffusion.data.shards import PackedSample, put_shard, write_shard
from diffusion.data.sidecar import (
    _OPEN,
    DamagedSidecar,
    Sidecars,
    computation_of,
    key_of,
    open_sidecar,
    sidecar_bytes,
)
from diffusion.data.stream import ShardReader, batches
from diffusion.recipe import Recipe, ShardRecipe
from diffusion.store.refs import DatasetRef
from diffusion.store.storage import LocalFolder, StorageRefused, open_storage
from diffusion.text import TextEncoder, TextIdentity, looking_up
from diffusion.training.step import TrainState, build_state, train_step
from tests.sidecars import in_a_root_of_its_own, sidecar_files
from tests.words import TOKENS, WIDTH, embed, install, reading, words

pytestmark = pytest.mark.usefixtures("one_thread")

BY = computation_of(words("minilm"))
SHARD = "5" * 64


@pytest.fixture(autouse=True)
def _words(monkeypatch):
    install(monkeypatch)


@pytest.fixture(scope="module")
def sharded(emoji_folder, tmp_path_factory) -> DatasetRef:
    root = tmp_path_factory.mktemp("store")
    return ingest.shard_dataset(emoji_folder, ShardRecipe(resolution=16, shard_size=8, holdout=0.2), root)


@pytest.fixture
def dataset(sharded, tmp_path) -> DatasetRef:
    return in_a_root_of_its_own(sharded, tmp_path)


def sidecars_of(reader: ShardReader, on_damage=None, encoder: TextEncoder | None = None) -> Sidecars:
    def unexpected(error: DamagedSidecar) -> None:
        raise AssertionError(error)

    shards = [entry.sha256 for entry in reader.entries]
    return Sidecars(reader.root, shards, encoder or words("minilm"), on_damage or unexpected)


class InMemory(dict):
    """As much of a storage as reading one file takes.  It counts."""

    uri = "memory"
    reads = 0

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        self.reads += 1
        return self[name][start:][:size]


def holding(embeddings: dict[str, np.ndarray]) -> InMemory:
    return InMemory({BY.place(SHARD): sidecar_bytes(BY, SHARD, embeddings)})


some_embeddings = st.dictionaries(
    st.text(st.characters(codec="utf-8")),
    st.integers(1, TOKENS).flatmap(
        lambda n: st.lists(st.floats(width=32), min_size=n * WIDTH, max_size=n * WIDTH).map(
            lambda values: np.array(values, np.float32).reshape(-1, WIDTH)
        )
    ),
    max_size=6,
)


@given(some_embeddings, st.randoms(use_true_random=False))
@example({f"number {i}": embed("one").numpy() for i in range(600)}, random.Random(0))  # digests that end with zeros too
def test_what_was_put_in_comes_out_and_nothing_else(embeddings, rng):
    root = holding(embeddings)
    sidecar = open_sidecar(root, BY, SHARD)
    for caption, value in embeddings.items():
        assert sidecar.find(caption).numpy().tobytes() == value.tobytes()
        assert sidecar.find(caption + "?") is None or caption + "?" in embeddings
    shuffled = list(embeddings.items())
    rng.shuffle(shuffled)
    data = sidecar_bytes(BY, SHARD, dict(shuffled))
    assert data == root[BY.place(SHARD)]

    theirs = safetensors.numpy.load(data)  # an independent reader
    assert [bytes(key) for key in theirs["caption"]] == sorted(map(key_of, embeddings))
    by_key = {key_of(caption): value for caption, value in embeddings.items()}
    for key, first, end in zip(theirs["caption"], theirs["first"][:-1], theirs["first"][1:], strict=True):
        assert theirs["tokens"][first:end].tobytes() == by_key[bytes(key)].tobytes()


@pytest.mark.parametrize("first_read", [8 + 1_000, 200_000, 2**22])
def test_a_file_longer_than_the_first_read_is_read_piece_by_piece(monkeypatch, first_read):
    """Ended in the table, in the embeddings, and not at all."""
    monkeypatch.setattr(sidecar_module, "_FIRST_READ_REMOTE", first_read)
    embeddings = {f"number {i}": np.full((1 + i % 3, WIDTH), i, np.float32) for i in range(4_000)}
    root = holding(embeddings)
    sidecar = open_sidecar(root, BY, SHARD)
    assert root.reads == 1 + (first_read < 10_000)
    for i in random.Random(0).sample(range(4_000), 50):
        assert sidecar.find(f"number {i}").numpy().tobytes() == embeddings[f"number {i}"].tobytes()
    assert (root.reads == 1) == (first_read == 2**22)


@given(st.data())
def test_a_damaged_file_gives_the_right_bits_or_is_named_never_others(data):
    embeddings = {caption: embed(caption).numpy() for caption in ("a red flag", "a face", "an oak")}
    root = holding(embeddings)
    name = BY.place(SHARD)
    written = bytearray(root[name])
    cut = data.draw(st.booleans())
    if cut:
        del written[data.draw(st.integers(0, len(written) - 1)) :]
    else:
        written[data.draw(st.integers(0, len(written) - 1))] ^= data.draw(st.integers(1, 255))
    root[name] = bytes(written)
    refused = []
    for caption, value in embeddings.items():
        try:
            assert open_sidecar(root, BY, SHARD).find(caption).numpy().tobytes() == value.tobytes()
        except DamagedSidecar as error:
            refused.append(str(error))
    assert all(name in reason and "Remove it" in reason and "\n" not in reason for reason in refused)
    assert refused or not cut


def test_a_damaged_header_is_told_in_a_line_and_not_in_a_library_s_words():
    root = holding({"a face": embed("a face").numpy()})
    name = BY.place(SHARD)
    written = root[name]
    for kind, damage in ((b"diffusion-precomputed", b"diffusion-prekomputed"), (b'"precomputed"', b'"prekomputed"')):
        root[name] = written.replace(kind, damage)
        assert root[name] != written
        with pytest.raises(
            DamagedSidecar, match=rf"{name} cannot be read: (format: it must be '|its header is not)[^\n]*$"
        ):
            open_sidecar(root, BY, SHARD)


def test_a_storage_that_refuses_says_nothing_about_a_sidecar():
    class Refusing(InMemory):
        def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
            raise StorageRefused("the credentials are wrong")

    with pytest.raises(StorageRefused):
        open_sidecar(Refusing(), BY, SHARD)


def test_a_name_says_all_that_the_content_depends_on(tmp_path):
    identity = BY.encoder
    others = [
        BY.model_copy(update={"device": "cuda"}),
        *(
            BY.model_copy(update={"encoder": identity.model_copy(update=changed)})
            for changed in ({"digest": "1" * 64}, {"tokens": 4}, {"width": 3}, {"name": "clip"}, {"precision": "bf16"})
        ),
    ]
    places = {by.place(shard) for by in (BY, *others) for shard in (SHARD, "6" * 64)}
    assert len(places) == 2 * (1 + len(others))
    root = LocalFolder(tmp_path)
    data = sidecar_bytes(BY, SHARD, {"a flag": embed("a flag").numpy()})
    root.put(BY.place(SHARD), data)
    for by in others:
        assert open_sidecar(root, by, SHARD) is None
        root.put(by.place(SHARD), data)  # under a name that is not its own
        with pytest.raises(DamagedSidecar, match="it is another's"):
            open_sidecar(root, by, SHARD)


def test_all_captions_of_a_shard_are_there_once(tmp_path):
    told = [
        [["a flag", 1.0], ["a red flag", 0.5], ["a flag", 2.0]],
        [],
        [["a face", 1.0], [" ", 1.0]],
        [["a flag", 1.0]],
    ]
    samples = [PackedSample(str(i), 0, {"captions": captions}, b"not looked at") for i, captions in enumerate(told)]
    entry = write_shard(tmp_path, "train", samples)
    root = LocalFolder(tmp_path / "root")
    put_shard(root, tmp_path, entry)
    assert captions_of(root, entry) == ["a flag", "a red flag", "a face"]
    assert Maker(Setup(root=root.uri, by=BY))(entry) == 4
    sidecar = open_sidecar(root, BY, entry.sha256)
    for caption in captions_of(root, entry):
        assert torch.equal(sidecar.find(caption), embed(caption))
    assert len(sidecar.keys) == 3

    wordless = write_shard(tmp_path, "train", [sample._replace(facts={"captions": []}) for sample in samples])
    put_shard(root, tmp_path, wordless)
    Maker(Setup(root=root.uri, by=BY))(wordless)
    assert open_sidecar(root, BY, wordless.sha256).find("a flag") is None


def test_a_shard_that_is_not_as_its_name_says_is_not_computed(dataset):
    root = manifest.root_of(dataset.uri)
    entry = missing(dataset, BY)[0]
    data = bytearray(root.read(entry.tar))
    data[600] ^= 1
    root.put(entry.tar, bytes(data))
    with pytest.raises(ValueError, match=rf"{entry.sha256}\.tar differs from the sha256"):
        precompute(dataset, BY)
    root.remove(entry.tar)
    with pytest.raises(ValueError, match=rf"{entry.sha256}\.tar is missing"):
        precompute(dataset, BY)
    assert sidecar_files(dataset) == {}


def test_every_shard_gets_one_and_who_makes_it_in_which_order_changes_no_byte(dataset):
    seen = []
    precompute(dataset, BY, progress=lambda done, total: seen.append((done, total)))
    made = sidecar_files(dataset)
    entries = manifest.load(dataset.uri).shards
    assert sorted(made) == sorted(BY.place(entry.sha256) for entry in entries)
    assert [done for done, _ in seen] == np.cumsum([entry.pictures for entry in entries]).tolist()
    assert seen[-1] == (dataset.images + dataset.holdout,) * 2

    def scattered(setup, entries):
        for entry in [*reversed(entries), entries[0]]:
            yield Maker(setup)(entry)

    for name in made:
        open_storage(manifest.root_of(dataset.uri).uri).remove(name)
    precompute(dataset, BY, each=scattered)
    assert sidecar_files(dataset) == made


def test_interrupted_it_goes_on_and_what_is_there_is_not_made_again(dataset):
    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done > total / 2:
            raise Killed

    with pytest.raises(Killed):
        precompute(dataset, BY, progress=kill)
    half, seen, asked = sidecar_files(dataset), [], []
    root = manifest.root_of(dataset.uri)
    marks = {found.name: found.mark for found in root.walk("precomputed")}
    assert 0 < len(half) < len(manifest.load(dataset.uri).shards)

    def each(setup, entries):
        asked.extend(BY.place(entry.sha256) for entry in entries)
        return in_process(setup, entries)

    precompute(dataset, BY, each=each, progress=lambda *state: seen.append(state))
    assert set(asked) == set(sidecar_files(dataset)) - set(half)
    assert seen[0][0] > (dataset.images + dataset.holdout) / 2  # a bar that goes on
    assert {found.name: found.mark for found in root.walk("precomputed") if found.name in half} == marks

    asked.clear()
    precompute(dataset, BY, each=each)
    assert asked == []


def test_versions_that_share_shards_share_their_sidecars(dataset):
    whole = manifest.load(dataset.uri)
    before = whole.model_copy(
        update={
            "shards": whole.shards[1:],
            "train_counts": (sum(whole.counts("train")[1:]), 0, 0),
            "files": whole.files - whole.shards[0].pictures,
        }
    )
    root = manifest.root_of(dataset.uri)
    precompute(before.ref(manifest.publish(before, root)), BY)
    assert [entry.sha256 for entry in missing(dataset, BY)] == [whole.shards[0].sha256]


def test_a_worker_with_another_encoder_is_refused(dataset):
    by = BY.model_copy(update={"encoder": BY.encoder.model_copy(update={"digest": "1" * 64})})
    with pytest.raises(ValueError, match=r"read by minilm 111111111111 .*and here is minilm 000000000000"):
        precompute(dataset, by)
    assert sidecar_files(dataset) == {}


def test_captions_are_looked_for_in_the_shards_of_their_batch(dataset):
    precompute(dataset, BY)
    reader = ShardReader(dataset.uri)
    order = Order(len(reader), 8, seed=3, window=8, streams=3)
    sidecars = sidecars_of(reader)
    assert sidecars.find(reader.read(0).caption) is None  # of no batch yet
    stream = batches(reader, order, 5, stop=2 * len(reader), threads=0)
    count = 0
    for batch in sidecars.beside(stream, order, reader.shards_of):
        for caption in batch.captions:
            assert torch.equal(sidecars.find(caption), embed(caption))
            count += 1
        assert sidecars.find("nobody's caption") is None
    assert count == 2 * len(reader)


def test_the_tables_in_memory_are_bounded_and_each_is_read_again_after_many_others(tmp_path):
    root, shards = LocalFolder(tmp_path), [f"{i:064x}" for i in range(2 * _OPEN)]
    for i, shard in enumerate(shards):
        value = np.full((1, WIDTH), i, np.float32)
        root.put(BY.place(shard), sidecar_bytes(BY, shard, {"a flag": value, f"number {i}": value}))
    sidecars = Sidecars(root, shards, words("minilm"), print)
    for i in (*range(2 * _OPEN), *range(2 * _OPEN)):
        sidecars.turn_to([i])
        assert sidecars.find("a flag")[0, 0] == sidecars.find(f"number {i}")[0, 0] == i
        assert len(sidecars._open) <= _OPEN
    sidecars.turn_to(range(2 * _OPEN))  # a batch of more shards than are kept
    assert sidecars.find(f"number {2 * _OPEN - 1}")[0, 0] == 2 * _OPEN - 1


def test_a_damaged_or_missing_sidecar_costs_computing_and_is_named_once(dataset):
    precompute(dataset, BY)
    reader, computed, told = ShardReader(dataset.uri), [], []
    names = [BY.place(entry.sha256) for entry in reader.entries[:3]]
    table, value = (bytearray(reader.root.read(name)) for name in names[:2])
    table[-len(table) + 8] ^= 1
    value[-1] ^= 1
    reader.root.put(names[0], bytes(table))
    reader.root.put(names[1], bytes(value))
    reader.root.remove(names[2])

    def counted(caption: str):
        computed.append(caption)
        return embed(caption)

    sidecars = sidecars_of(reader, told.append)
    encoder = looking_up(TextEncoder(BY.encoder, counted), sidecars.find)
    sidecars.turn_to(range(len(reader.entries)))
    captions = [reader.read(i).caption for i in range(len(reader))]
    assert torch.equal(encoder(captions).text, words()(captions).text)
    assert [name in str(error) for name, error in zip(names[:2], told, strict=True)] == [True, True]
    first, others = len(computed), sum(reader.counts[3:])
    assert len(reader) - others >= first >= reader.counts[0] + reader.counts[2]
    encoder(captions)
    assert len(told) == 2


def weights(state: TrainState) -> dict[str, bytes]:
    return {name: value.detach().numpy().tobytes() for name, value in state.net.named_parameters()}


def test_training_is_the_same_to_the_bit_and_computes_no_caption(dataset, tiny_recipe: Recipe):
    precompute(dataset, BY)
    recipe = reading(tiny_recipe.train)
    reader = ShardReader(dataset.uri)
    order = order_of(reader.manifest, "train", recipe)

    def trained(prepare) -> TrainState:
        state = build_state(recipe, resolution=dataset.resolution, classes=len(dataset.classes), device="cpu")
        stream = prepare(state, batches(reader, order, recipe.batch_size, stop=3 * recipe.batch_size))
        for batch in stream:
            train_step(state, batch, recipe)
        return state

    def refuse(caption: str):
        raise AssertionError(f"{caption!r} was computed")

    def from_sidecars(state, stream):
        sidecars = sidecars_of(reader, encoder=state.encoder)
        state.encoder = looking_up(TextEncoder(state.encoder.identity, refuse), sidecars.find)
        return sidecars.beside(stream, order, reader.shards_of)

    plain, found = trained(lambda state, stream: stream), trained(from_sidecars)
    assert weights(plain) == weights(found)
    start = build_state(recipe, resolution=dataset.resolution, classes=len(dataset.classes), device="cpu")
    assert any(value != weights(start)[name] for name, value in weights(plain).items())
    assert plain.text == TextIdentity(name="minilm", digest="0" * 64, width=WIDTH, tokens=TOKENS)
