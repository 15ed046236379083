"""training/checkpoint.py: what is saved comes back bit for bit; what is damaged or foreign is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion.recipe import TrainRecipe, UNetRecipe, digest_of
from diffusion.store.refs import DatasetRef
from diffusion.training import checkpoint
from diffusion.training.checkpoint import DamagedCheckpoint
from diffusion.training.step import TrainState, build_state, train_step
from tests.test_step import bits_of, emoji, part  # noqa: F401  (emoji is a fixture)
from tests.words import install, reading

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = TrainRecipe(
    unet=UNetRecipe(channels=16, multipliers=(1, 2), blocks=(1, 1), attention=()),
    images=96,
    batch_size=12,
    warmup_images=0,
    ema=(0.05, 0.1),
)
DATASET = DatasetRef(
    uri="/data", digest="d" * 64, resolution=16, classes=("a", "b", "c"), images=60, holdout=0, rejected=0
)
FACTS = checkpoint.facts_of(RECIPE, DATASET, world=1, device=torch.device("cpu"))


def fresh() -> TrainState:
    return build_state(RECIPE, resolution=16, classes=3, device="cpu")


@pytest.fixture(scope="module")
def trained(emoji) -> TrainState:  # noqa: F811
    state = fresh()
    for _ in range(2):
        train_step(state, emoji, RECIPE)
    return state


@pytest.fixture
def runs(trained: TrainState, tmp_path: Path) -> Path:
    """Two checkpoints, at 12 (in truth the same state) and 24 images."""
    for images_seen in (12, 24):
        checkpoint.save(trained, checkpoint.folder_of(tmp_path, images_seen), FACTS)
    return tmp_path


def test_what_is_saved_comes_back_bit_for_bit(trained: TrainState, runs: Path):
    state = fresh()
    assert checkpoint.load(checkpoint.folder_of(runs, 24), state, FACTS) == {}
    assert bits_of(state) == bits_of(trained)
    for own, loaded in zip(trained.net.parameters(), state.net.parameters(), strict=True):
        assert own.stride() == loaded.stride()
        moments, loaded_moments = trained.optimizer.state[own], state.optimizer.state[loaded]
        assert {k: v.stride() for k, v in moments.items()} == {k: v.stride() for k, v in loaded_moments.items()}


def test_the_digest_tells_nothing_of_where_the_data_and_the_run_lie(trained: TrainState, tmp_path: Path):
    places = {}
    for place in ("here", "there"):
        dataset = DATASET.model_copy(update={"uri": str(tmp_path / place / "data")})
        facts = checkpoint.facts_of(RECIPE, dataset, world=1, device=torch.device("cpu"))
        places[place] = checkpoint.save(trained, checkpoint.folder_of(tmp_path / place, 24), facts)
    assert places["here"] == places["there"]


def test_the_step_after_loading_has_the_same_bits(trained: TrainState, runs: Path, emoji):  # noqa: F811
    first, second = fresh(), fresh()
    for state in (first, second):
        checkpoint.load(checkpoint.folder_of(runs, 24), state, FACTS)
        train_step(state, part(emoji, slice(0, 6)), RECIPE)
    assert bits_of(first) == bits_of(second)
    assert bits_of(first) != bits_of(trained)


def test_a_learned_uncertainty_resumes_bit_for_bit_and_stays_out_of_the_averages(tmp_path: Path, emoji):  # noqa: F811
    recipe = RECIPE.model_copy(update={"weight": "uncertainty"})
    facts = FACTS.model_copy(update={"recipe": recipe})
    whole, resumed = (build_state(recipe, resolution=16, classes=3, device="cpu") for _ in range(2))
    train_step(whole, emoji, recipe)
    folder = tmp_path / "1"
    checkpoint.save(whole, folder, facts)
    checkpoint.load(folder, resumed, facts)
    assert bits_of(resumed) == bits_of(whole)
    for state in (whole, resumed):
        train_step(state, emoji, recipe)
    assert bits_of(resumed) == bits_of(whole)
    assert resumed.uncertainty.out.weight.any()
    assert load_file(folder / "uncertainty.safetensors").keys() == {"out.weight", "out.bias"}
    averages = load_file(folder / "ema-0.1.safetensors")
    assert averages.keys() == dict(whole.net.named_parameters()).keys()


def test_equal_states_have_equal_digests_and_files_without_pickle(trained: TrainState, tmp_path: Path):
    first, second = (checkpoint.save(trained, tmp_path / name / "1", FACTS) for name in "ab")
    assert first == second == digest_of(checkpoint.verify(tmp_path / "a" / "1"))
    names = {path.name for path in (tmp_path / "a" / "1").iterdir()}
    assert names == {
        "weights.safetensors",
        "ema-0.05.safetensors",
        "ema-0.1.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }
    manifest = json.loads((tmp_path / "a" / "1" / "manifest.json").read_text())
    assert manifest["ema"] == {"0.05": "ema-0.05.safetensors", "0.1": "ema-0.1.safetensors"}
    assert set(manifest["files"]) == names - {"manifest.json"}


def test_saving_again_keeps_what_is_published(trained: TrainState, runs: Path):
    folder = checkpoint.folder_of(runs, 24)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert checkpoint.save(trained, folder, FACTS) == digest_of(checkpoint.verify(folder))
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["weights.safetensors", "ema-0.1.safetensors", "optimizer.safetensors", "state.json"])
def test_one_flipped_bit_is_found_and_named(runs: Path, name: str):
    folder = checkpoint.folder_of(runs, 24)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    state = fresh()
    before = bits_of(state)
    with pytest.raises(DamagedCheckpoint, match=name):
        checkpoint.load(folder, state, FACTS)
    assert bits_of(state) == before


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(trained: TrainState, runs: Path):
    newest = checkpoint.folder_of(runs, 24)
    assert checkpoint.latest(runs) == (newest, [])
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    folder, damaged = checkpoint.latest(runs)
    assert folder == checkpoint.folder_of(runs, 12)
    assert len(damaged) == 1
    assert str(weights) in damaged[0]
    # the run comes by again: what is damaged is set aside, and the name is used for the good one
    checkpoint.save(trained, newest, FACTS)
    assert checkpoint.latest(runs) == (newest, [])
    assert [path.name for path in runs.glob("*.damaged-*")] == [f"{newest.name}.damaged-1"]


def test_a_folder_without_manifest_or_an_edited_one_is_damaged(runs: Path):
    folder = checkpoint.folder_of(runs, 24)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()), indent=1))
    with pytest.raises(DamagedCheckpoint, match="edited"):
        checkpoint.verify(folder)
    manifest.unlink()
    with pytest.raises(DamagedCheckpoint, match="cannot be read"):
        checkpoint.verify(folder)
    assert checkpoint.latest(runs / "nowhere") == (None, [])


def test_another_recipe_or_dataset_is_refused_by_name(runs: Path):
    folder, state = checkpoint.folder_of(runs, 24), fresh()
    other = RECIPE.model_copy(update={"lr": 0.5, "unet": RECIPE.unet.model_copy(update={"blocks": (1, 2)})})
    changes = r"train\.lr is 0\.005, asked 0\.5; train\.unet\.blocks is \[1, 1\], asked \[1, 2\]"
    with pytest.raises(ValueError, match=changes):
        checkpoint.load(folder, state, FACTS.model_copy(update={"recipe": other}))
    with pytest.raises(ValueError, match=r"dataset\.digest is d{12}, asked e{12}"):
        checkpoint.load(folder, state, FACTS.model_copy(update={"dataset_digest": "e" * 64}))
    assert state.images_seen == 0


def test_other_surroundings_are_allowed_and_told(runs: Path):
    facts = FACTS.model_copy(update={"world": 2})
    assert checkpoint.load(checkpoint.folder_of(runs, 24), fresh(), facts) == {"world": (1, 2)}


def test_another_text_encoder_is_refused_and_without_one_nothing_is_said(tmp_path: Path, monkeypatch):
    install(monkeypatch)
    recipe = reading(RECIPE).model_copy(update={"images": 12})
    state = build_state(recipe, resolution=16, classes=3, device="cpu")
    facts = checkpoint.facts_of(recipe, DATASET, world=1, device=torch.device("cpu"), text=state.text)
    checkpoint.save(state, tmp_path / "1", facts)
    assert checkpoint.load(tmp_path / "1", state, facts) == {}
    other = facts.model_copy(update={"text": state.text.model_copy(update={"digest": "1" * 64})})
    with pytest.raises(
        ValueError, match=r"trained on the text encoder minilm 000000000000 .* and here is minilm 11111111"
    ):
        checkpoint.load(tmp_path / "1", state, other)
    assert "text" not in FACTS.model_dump()
