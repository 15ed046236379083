"""training/retention.py: which checkpoints stay, and that nothing an evaluation reads goes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from diffusion.recipe import EvaluateRecipe, TrainRecipe, checkpoints_of
from diffusion.store.averages import moments_read
from diffusion.store.publish import withdraw
from diffusion.training.retention import Keep, superseded

RECIPE = TrainRecipe(images=1_000, batch_size=10, checkpoint_images=100)  # at 100, 200, ... 1000


@pytest.mark.parametrize(
    ("keep", "now", "gone"),
    [
        (Keep(), 1_000, []),
        (Keep(last=2), 200, []),
        (Keep(last=2), 500, [100, 200, 300]),
        (Keep(last=3, images=300), 1_000, [100, 200, 400, 500, 700]),
        (Keep(last=2, images=250), 1_000, [100, 200, 400, 600, 700]),  # the first at or beyond 250, 500, 750, 1000
        (Keep(last=2, moments=(100, 600)), 1_000, [200, 300, 400, 500, 700, 800]),
    ],
)
def test_the_rules_add_up(keep: Keep, now: int, gone: list[int]):
    assert superseded(RECIPE, keep, now) == gone


@given(
    images=st.integers(1, 300),
    batch=st.integers(1, 40),
    every=st.integers(5, 90),
    last=st.integers(2, 5),
    each=st.none() | st.integers(1, 200),
)
def test_what_went_is_never_wanted_again_and_the_end_and_one_before_it_stay(images, batch, every, last, each):
    recipe = TrainRecipe(images=images, batch_size=batch, checkpoint_images=every)
    keep = Keep(last=last, images=each)
    moments, gone = checkpoints_of(recipe), set()
    for now in moments:
        before, gone = gone, set(superseded(recipe, keep, now))
        assert before <= gone
        assert not gone & {*[moment for moment in moments if moment <= now][-2:]}


def test_rules_that_say_nothing_are_refused():
    with pytest.raises(ValidationError, match="say how many of the newest"):
        Keep(images=100)
    with pytest.raises(ValidationError):
        Keep(last=1)


@pytest.mark.parametrize(
    ("evaluate", "read"),
    [
        ({"ema": 0.1}, [1_000]),
        ({"ema": 0.1, "guide_images": 300}, [300, 1_000]),
        ({"ema": 0.1, "guide_images": 300, "guide_ema": 0.07}, [100, 200, 300, 1_000]),
        ({"ema": 0.07}, list(range(100, 1_001, 100))),
    ],
)
def test_an_evaluation_names_the_checkpoints_that_it_reads(evaluate: dict, read: list[int]):
    assert list(moments_read(EvaluateRecipe(**evaluate), RECIPE)) == read


def test_what_is_withdrawn_is_gone_with_no_trace_and_twice_is_once(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "file").write_bytes(b"x")
    for _ in range(2):
        withdraw(tmp_path / "1")
        assert list(tmp_path.iterdir()) == []
