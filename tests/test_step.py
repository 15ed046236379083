"""training/step.py: what is random depends on positions only; the step learns; what is not finite is named."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion import schedule
from diffusion.data import images
from diffusion.data.stream import Batch
from diffusion.density import stratified
from diffusion.recipe import TrainRecipe, UNetRecipe
from diffusion.schedule import log_normal_sigma
from diffusion.training.corrupt import corrupt
from diffusion.training.step import (
    NonFiniteLoss,
    TrainState,
    build_state,
    end_of,
    lr_at,
    raise_if_not_finite,
    train_step,
)

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = TrainRecipe(
    unet=UNetRecipe(channels=16, multipliers=(1, 2), blocks=(1, 1), attention=()),
    images=96,
    batch_size=12,
    warmup_images=0,
    decay="none",
    precision="fp32",
)
CPU = torch.device("cpu")
CLASSES = 3


@pytest.fixture(scope="module")
def emoji(emoji_folder: Path) -> Batch:
    """Twelve real pictures, four of each class, at 16 x 16."""
    folders = sorted(path for path in emoji_folder.iterdir() if path.is_dir())
    files = [(label, file) for label, folder in enumerate(folders) for file in sorted(folder.glob("*.png"))[:4]]
    pixels = [images.decode(file.read_bytes(), resolution=16, background="#ffffff") for _, file in files]
    return Batch(
        images=torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(),
        label=torch.tensor([label for label, _ in files]),
        captions=[""] * len(files),
        keys=[file.stem for _, file in files],
        index=torch.arange(1_000, 1_000 + len(files)),
    )


def part(batch: Batch, rows: list[int] | slice) -> Batch:
    places = list(range(len(batch.keys)))[rows] if isinstance(rows, slice) else rows
    return Batch(
        images=batch.images[places],
        label=batch.label[places],
        captions=[batch.captions[i] for i in places],
        keys=[batch.keys[i] for i in places],
        index=batch.index[places],
    )


def state_of(recipe: TrainRecipe) -> TrainState:
    return build_state(recipe, resolution=16, classes=CLASSES, device=CPU)


def bits_of(state: TrainState) -> list[bytes]:
    """Every number of a state, exactly."""
    tensors = [
        *state.net.state_dict().values(),
        *(state.uncertainty.state_dict().values() if state.uncertainty else ()),
        *(average for averages in state.ema.averages.values() for average in averages),
        *(value for p in state.parameters().values() for _, value in sorted(state.optimizer.state.get(p, {}).items())),
    ]
    return [tensor.detach().contiguous().numpy().tobytes() for tensor in tensors] + [str(state.images_seen).encode()]


def test_learning_rate_has_its_closed_form():
    cosine = RECIPE.model_copy(update={"images": 1_000, "warmup_images": 100, "decay": "cosine", "lr": 0.5})
    assert lr_at(cosine, 0) == 0
    assert lr_at(cosine, 50) == pytest.approx(0.25 * (1 + math.cos(math.pi * 0.05)) / 2)
    assert lr_at(cosine, 500) == pytest.approx(0.25)
    assert lr_at(cosine, 1_000) == pytest.approx(0)
    root = cosine.model_copy(update={"decay": "inverse_sqrt", "decay_images": 200})
    assert lr_at(root, 150) == lr_at(root, 200) == 0.5
    assert lr_at(root, 800) == pytest.approx(0.25)
    assert lr_at(cosine.model_copy(update={"decay": "none"}), 999) == 0.5


def test_learning_rate_of_a_step_is_that_of_its_middle_whatever_came_before(emoji: Batch):
    recipe = RECIPE.model_copy(update={"decay": "cosine", "warmup_images": 24})
    state = state_of(recipe)
    state.images_seen = 36
    result = train_step(state, emoji, recipe)
    assert result.lr == lr_at(recipe, 42)
    assert {group["lr"] for group in state.optimizer.param_groups} == {result.lr}


def test_a_run_ends_with_a_whole_batch():
    assert end_of(RECIPE) == 96
    assert end_of(RECIPE.model_copy(update={"images": 97})) == 108


def test_everything_random_about_a_picture_depends_on_its_position_only(emoji: Batch):
    recipe = RECIPE.model_copy(update={"hflip": True, "label_drop": 0.5})
    whole = corrupt(emoji, recipe, CLASSES, CPU)
    rows = [7, 2, 11]
    for all_rows, some in zip(whole, corrupt(part(emoji, rows), recipe, CLASSES, CPU), strict=True):
        assert torch.equal(all_rows[rows], some)
    other = corrupt(emoji._replace(index=emoji.index + 500), recipe, CLASSES, CPU)
    assert not torch.equal(whole.noise, other.noise)
    assert not torch.equal(whole.sigma, other.sigma)


def test_noise_levels_labels_and_mirroring_follow_the_recipe():
    n = 20_000
    pictures = torch.zeros(n, 3, 1, 2, dtype=torch.uint8)
    pictures[..., 0] = 255  # white on the left
    batch = Batch(pictures, torch.ones(n, dtype=torch.int64), [""] * n, ["k"] * n, torch.arange(n))
    recipe = RECIPE.model_copy(update={"hflip": True, "label_drop": 0.25, "noise_mean": -0.8, "noise_std": 1.1})
    x0, noise, sigma, label, _, level = corrupt(batch, recipe, CLASSES, CPU)
    error = 5 / math.sqrt(n)
    assert sigma.log().mean().item() == pytest.approx(-0.8, abs=1.1 * error)
    assert sigma.log().std().item() == pytest.approx(1.1, abs=1.1 * error)
    assert (label == CLASSES).float().mean().item() == pytest.approx(0.25, abs=error)
    assert set(label.unique().tolist()) == {1, CLASSES}
    assert (x0[:, 0, 0, 0] < 0).float().mean().item() == pytest.approx(0.5, abs=error)
    assert torch.equal(x0.sum(-1), torch.zeros(n, 3, 1))  # mirrored, not changed otherwise
    assert torch.bincount(level, minlength=4).tolist() == pytest.approx([n / 4] * 4, rel=0.1)
    assert torch.equal(level.sort().values, level[sigma.argsort()])  # levels are ranges of sigma
    assert abs(noise.mean().item()) < error


def sigma_of(recipe: TrainRecipe, batch: Batch) -> torch.Tensor:
    return corrupt(batch, recipe, CLASSES, CPU).sigma


def test_log_uniform_levels_fill_their_range_evenly():
    n = 4_000
    batch = Batch(
        torch.zeros(n, 3, 1, 2, dtype=torch.uint8), torch.zeros(n).long(), [""] * n, ["k"] * n, torch.arange(n)
    )
    recipe = RECIPE.model_copy(update={"noise": "log_uniform", "noise_min": 0.01, "noise_max": 100.0})
    share = sigma_of(recipe, batch).log10().add(2).div(4).double().sort().values
    # Kolmogorov-Smirnov: a distance of 1.95 / sqrt(n) is passed by chance once in a thousand
    assert (share - (torch.arange(n) + 0.5) / n).abs().max() < 1.95 / math.sqrt(n)


@pytest.mark.parametrize(("chain", "steps"), [("linear", 1_000), ("cosine", 1_000), ("source-text", 10)])
def test_uniform_t_draws_every_step_of_the_chain_equally_often(chain: str, steps: int):
    """Stratified over one batch of 4 T positions, each step comes exactly four times."""
    n = 4 * steps
    batch = Batch(
        torch.zeros(n, 3, 1, 2, dtype=torch.uint8), torch.zeros(n).long(), [""] * n, ["k"] * n, torch.arange(n)
    )
    change = {"noise": "uniform_t", "chain": chain, "chain_steps": steps, "noise_stratified": True, "batch_size": n}
    sigma = sigma_of(RECIPE.model_copy(update=change), batch)
    levels = schedule.sigmas_of_betas(schedule.BETAS[chain](steps))
    expected = levels.clamp(max=schedule.SIGMA_CEILING).float()
    torch.testing.assert_close(sigma.sort().values, expected.repeat_interleave(4))


def test_a_stratified_batch_has_one_level_in_each_of_its_parts(emoji: Batch):
    recipe = RECIPE.model_copy(update={"noise_stratified": True, "noise_mean": 0.0, "noise_std": 1.0})
    places = set()
    for step in range(40):
        batch = emoji._replace(index=torch.arange(12) + 12 * step)
        stratum = (torch.special.ndtr(sigma_of(recipe, batch).double().log()) * 12).long()
        assert sorted(stratum.tolist()) == list(range(12))
        places.add(stratum[5].item())
    assert len(places) > 8  # a place in the batch is not tied to a part: all but surely 12 of 12 in 40 batches


def test_stratified_levels_depend_on_the_position_only_and_not_on_who_computes_them(emoji: Batch):
    """Any share of the global batch, in any order, on any number of workers."""
    recipe = RECIPE.model_copy(update={"noise_stratified": True})
    batch = emoji._replace(index=torch.arange(24, 36))
    whole = sigma_of(recipe, batch)
    for world in (2, 3, 4, 12):
        size = 12 // world
        shares = [sigma_of(recipe, part(batch, slice(rank * size, (rank + 1) * size))) for rank in range(world)]
        assert torch.equal(torch.cat(shares), whole)
    rows = [7, 2, 11]
    assert torch.equal(sigma_of(recipe, part(batch, rows)), whole[rows])


def test_stratified_levels_are_finite_and_uniform_at_any_batch_size():
    """The last of a million strata stays below 1, and a place's own u is uniform over the batches."""
    size = 2**20
    first = torch.arange(4_000) * size
    last = first + size - 1 - (stratified(0, first, size) * size).long()
    u = stratified(0, last, size)
    assert ((u * size).long() == size - 1).all()
    assert u.max() < 1
    assert log_normal_sigma(u, mean=0.0, std=1.0).isfinite().all()
    n = 4_000
    at_one_place = stratified(3, torch.arange(n) * 16 + 5, 16).sort().values
    assert (at_one_place - (torch.arange(n) + 0.5) / n).abs().max() < 1.95 / math.sqrt(n)


def test_the_gradient_is_the_mean_over_the_global_batch(emoji: Batch):
    """Two equal shares, averaged as data parallelism does, against the whole batch."""
    recipe = RECIPE.model_copy(update={"clip_norm": 1e9})

    def gradient(batch: Batch) -> list[torch.Tensor]:
        state = state_of(recipe)
        torch.nn.init.normal_(state.net.net.head.weight, generator=torch.Generator().manual_seed(1))
        train_step(state, batch, recipe)
        return [p.grad for p in state.net.parameters()]

    halves = zip(gradient(part(emoji, slice(0, 6))), gradient(part(emoji, slice(6, 12))), strict=True)
    for whole, (a, b) in zip(gradient(emoji), halves, strict=True):
        torch.testing.assert_close(whole, (a + b) / 2, rtol=1e-4, atol=1e-5)


def test_one_batch_overfits(emoji: Batch):
    recipe = RECIPE.model_copy(update={"lr": 4e-3, "label_drop": 0.0})
    state = state_of(recipe)
    losses = [train_step(state, emoji, recipe).losses.mean().item() for _ in range(300)]
    assert np.mean(losses[-5:]) < 0.1 * losses[0]


@pytest.mark.parametrize("weight", ["simple", "p2", "min_snr", "uncertainty"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_a_step_with_each_prediction_and_weight_moves_all_that_is_learned(emoji: Batch, prediction: str, weight: str):
    recipe = RECIPE.model_copy(update={"prediction": prediction, "weight": weight})
    state = state_of(recipe)
    head = state.net.net.head.weight.detach().clone()
    train_step(state, emoji, recipe)
    assert not torch.equal(state.net.net.head.weight, head)
    assert (state.uncertainty is not None) == (weight == "uncertainty")
    if state.uncertainty:
        assert state.uncertainty.out.weight.any()
        assert not any(name.startswith("uncertainty") for name in state.ema.names)


def test_the_same_step_has_the_same_bits(emoji: Batch):
    dropout = RECIPE.model_copy(update={"unet": RECIPE.unet.model_copy(update={"dropout": 0.3}), "precision": "bf16"})
    first, second = state_of(dropout), state_of(dropout)
    for state in (first, second):
        torch.manual_seed(id(state))  # torch's own generator is no part of a run
        for _ in range(3):
            train_step(state, emoji, dropout)
    assert bits_of(first) == bits_of(second)


def test_a_non_finite_loss_names_its_pictures_and_changes_nothing(emoji: Batch):
    recipe = RECIPE.model_copy(update={"label_drop": 0.0})
    state = state_of(recipe)
    train_step(state, emoji, recipe)
    with torch.no_grad():
        state.net.net.embedding.label.weight[1].fill_(math.inf)
    before = bits_of(state)
    with pytest.raises(NonFiniteLoss) as caught:
        train_step(state, emoji, recipe)
    assert bits_of(state) == before
    named = {key for key, _, _ in caught.value.samples}
    assert named == {key for key, label in zip(emoji.keys, emoji.label.tolist(), strict=True) if label == 1}
    message = str(caught.value)
    assert all(key in message for key in named)
    assert "images_seen=12" in message
    assert "sigma" in message
    assert "train.lr" in message


def test_a_non_finite_gradient_of_finite_losses_is_found(emoji: Batch):
    state = state_of(RECIPE)
    before = bits_of(state)
    state.net.net.head.bias.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteLoss, match="the losses are finite, the gradient is not") as caught:
        train_step(state, emoji, RECIPE)
    assert bits_of(state) == before
    assert {key for key, _, _ in caught.value.samples} == set(emoji.keys)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: there the check comes after the step")
def test_on_a_gpu_a_non_finite_step_updates_no_weight(emoji: Batch):
    state = build_state(RECIPE, resolution=16, classes=CLASSES, device="cuda")
    train_step(state, emoji, RECIPE)
    weights = [p.detach().clone() for p in state.net.parameters()]
    hook = state.net.net.head.bias.register_hook(lambda gradient: gradient * math.inf)
    result = train_step(state, emoji, RECIPE)
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(weights, state.net.parameters(), strict=True))
    with pytest.raises(NonFiniteLoss):
        raise_if_not_finite(result, emoji, 12)
