"""training/retention.py: which checkpoints stay, and that nothing an evaluation reads goes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from diffusion.recipe import EvaluateRecipe, TrainRecipe, checkpoints_of
from diffusion.store.averages import moments_read
from diffusion.store.publish import withdraw
from diffusion.training.journal import SCORE, Journal, Judged, judged_in
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


def test_the_best_are_those_with_the_lowest_numbers_of_equal_ones_the_earlier_and_one_that_is_being_judged_stays():
    scores = {100: 9.0, 200: 3.0, 300: 5.0, 400: 3.0, 500: 7.0}
    for best, under_way, gone in (
        (1, None, [100, 300, 400, 500, 600, 700, 800]),
        (2, 600, [100, 300, 500, 700, 800]),
        (3, 600, [100, 500, 700, 800]),
        (9, None, [600, 700, 800]),
        (None, 600, [100, 200, 300, 400, 500, 600, 700, 800]),
    ):
        assert superseded(RECIPE, Keep(last=2, best=best), 1_000, Judged({"": scores}, under_way)) == gone


def test_numbers_of_unlike_kinds_are_not_compared_and_the_best_of_each_stay():
    judged = Judged({"few": {100: 9.0, 200: 8.0}, "many": {300: 1.0, 400: 2.0}})
    assert superseded(RECIPE, Keep(last=2, best=1), 600, judged) == [100, 400]


class Run:
    """Checkpoints come, and one at a time is judged, in whatever order and however long it takes."""

    def __init__(self, recipe: TrainRecipe, keep: Keep) -> None:
        self.recipe, self.keep, self.there, self.judged = recipe, keep, set(), Judged({"": {}})

    def begin(self, moment: int) -> None:
        if self.judged.under_way is None and moment not in self.judged.scores[""]:
            self.judged = self.judged._replace(under_way=moment)

    def end(self, score: float | None) -> None:
        """None: it failed, or its driver was killed."""
        now = self.judged.under_way
        told = {} if now is None or score is None else {now: score}
        self.judged = Judged({"": self.judged.scores[""] | told})

    def publish(self, moment: int) -> None:
        self.there.add(moment)
        self.there -= set(superseded(self.recipe, self.keep, moment, self.judged))


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    batch=st.integers(1, 40),
    every=st.integers(20, 90),
    last=st.integers(2, 4),
    each=st.none() | st.integers(1, 200),
    best=st.integers(1, 3),
)
def test_whatever_comes_when_the_best_of_those_judged_are_there_and_few_others(data, batch, every, last, each, best):
    recipe = TrainRecipe(images=400, batch_size=batch, checkpoint_images=every)
    run, without = Run(recipe, Keep(last=last, images=each, best=best)), Keep(last=last, images=each)
    moments = checkpoints_of(recipe)
    for i, now in enumerate(moments):
        run.publish(now)
        scores, under_way = run.judged.scores[""], run.judged.under_way
        winners = [m for m in scores if sum((scores[o], o) < (scores[m], m) for o in scores) < best]
        ruled = {*moments[: i + 1]} - {*superseded(recipe, without, now)}
        assert run.there == {*winners, *ruled} | ({under_way} - {None})
        for _ in range(data.draw(st.integers(0, 2))):
            run.end(data.draw(st.none() | st.integers(0, 5).map(float)))
            run.begin(data.draw(st.sampled_from(sorted(run.there))))


def test_what_was_judged_is_read_from_the_history_while_it_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert judged_in(path) == Judged({}, None, frozenset())
    journal = Journal(path)
    journal.metrics({"images_seen": 100, "loss": 0.5})
    for moment, told in (
        (100, {"event": "validated", "recipe": "few", SCORE: 9.0}),
        (200, {"event": "validation_failed", "reason": "validated too late"}),
        (300, {"event": "validated", "recipe": "many", SCORE: 1.0}),
        (400, {"event": "validated", "recipe": "many"}),  # pictures that are not finite have no distance
        (500, {"event": "validated", "recipe": "few", SCORE: 8.0}),
    ):
        journal.event({"event": "validating", "images_seen": moment})
        assert judged_in(path).under_way == moment
        journal.event({"images_seen": moment, **told})
        assert judged_in(path).under_way is None
    judged = judged_in(path)
    assert judged == Judged({"many": {300: 1.0}, "few": {100: 9.0, 500: 8.0}}, None, frozenset({100, 300, 400, 500}))
    assert list(judged.scores) == ["many", "few"]  # the newest last
    assert judged.among([100, 300]).scores == {"many": {300: 1.0}, "few": {100: 9.0}}
    with open(path, "a") as file:
        file.write(json.dumps({"event": "validated", "images_seen": 600, "recipe": "few", SCORE: 0.5}))
    assert judged_in(path) == judged


def test_rules_that_say_nothing_are_refused():
    for rule in ("images", "best"):
        with pytest.raises(ValidationError, match=f"{rule}=100 without last.*say how many of the newest"):
            Keep(**{rule: 100})
    with pytest.raises(ValidationError):
        Keep(last=1)


@pytest.mark.parametrize(
    ("evaluate", "read"),
    [
        ({"ema": 0.1}, [1_000]),
        ({"ema": 0.1, "images": 400}, [400]),
        ({"ema": 0.07, "images": 400}, [100, 200, 300, 400]),
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
