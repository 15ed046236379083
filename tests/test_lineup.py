"""Which model a request gets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.serving.lineup import Canary, Lineup, UnknownModel, point_of, seeded
from diffusion.store.refs import ModelRef


def model(name: str, version: str) -> ModelRef:
    lineage = {"run_digest": "1" * 64, "dataset_digest": "2" * 64}
    return ModelRef(uri="memory", digest=version * 64, name=name, version=version, aliases=(), **lineage)


A1, A2, A3, B1 = (model(*each) for each in (("a", "1"), ("a", "2"), ("a", "3"), ("b", "1")))
points = st.floats(0, 1, exclude_max=True)


def test_a_name_is_its_first_version_and_no_name_the_first_model() -> None:
    lineup = Lineup(models=(A2, B1, A1))
    assert {name: lineup.choose(name, 0.5) for name in (None, "a", "a@1", "a@2", "b", "b@1")} == {
        None: A2,
        "a": A2,
        "a@1": A1,
        "a@2": A2,
        "b": B1,
        "b@1": B1,
    }
    assert lineup.names() == {"a": A2, "b": B1, "a@1": A1}
    for unknown in ("c", "a@9", "@1", "b@2", "a@1@1", "A", "a@"):
        with pytest.raises(UnknownModel, match="not served here") as refused:
            lineup.choose(unknown, 0.0)
        assert refused.value.allowed == ["a", "b", "a@1"]


@given(points, st.floats(0.01, 0.5), st.floats(0.01, 0.4))
def test_shares_are_of_requests_that_name_no_version(point: float, share: float, more: float) -> None:
    lineup = Lineup(models=(A1, A2, B1), canaries=(Canary(version="2", share=share),))
    assert lineup.choose(None, point) == lineup.choose("a", point) == (A2 if point < share else A1)
    assert (lineup.choose("a@1", point), lineup.choose("b", point)) == (A1, B1)
    grown = Lineup(models=(A1, A2), canaries=(Canary(version="2", share=share + more),))
    if lineup.choose(None, point) == A2:
        assert grown.choose(None, point) == A2


def test_requests_get_their_shares() -> None:
    lineup = Lineup(models=(A1, A2, A3), canaries=(Canary(version="3", share=0.1), Canary(version="2", share=0.3)))
    got = [lineup.choose(None, point_of({"label": "cat", "seed": seed}, {})).version for seed in range(4_000)]
    # of 4,000 the standard errors are 0.008, 0.007 and 0.005
    assert [got.count(version) / 4_000 for version in "123"] == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


def test_the_same_request_lies_at_the_same_point_however_its_answer_is_wanted() -> None:
    asked = {"label": "cat", "seed": 7, "n": 2}
    same = [
        {"n": 2, "seed": 7, "label": "cat", "model": "a", "stream": True, "partial_images": 3},
        {**asked, "response_format": "png", "user": "me", "steps": None},
    ]
    assert {point_of(each, {"image": b"1"}) for each in (asked, *same)} == {point_of(asked, {"image": b"1"})}
    others = [asked, asked | {"seed": 8}, asked | {"n": 3}, asked | {"steps": 3}]
    assert len({point_of(each, files) for each in others for files in ({}, {"image": b"1"}, {"image": b"2"})}) == 12


def test_a_request_without_a_seed_gets_one() -> None:
    assert seeded({"seed": 3, "n": 1}) == {"seed": 3, "n": 1}
    assert seeded({"seed": 0}) == {"seed": 0}
    drawn = [seeded(fields)["seed"] for fields in ({}, {"seed": None}, {"seed": ""})]
    assert len(set(drawn)) == 3
    assert all(0 <= seed < 2**32 for seed in drawn)


@pytest.mark.parametrize(
    ("models", "canaries", "says"),
    [
        ((A1, A1), (), "once"),
        ((A1, A2), (("2", 0.5), ("2", 0.1)), "each once"),
        ((A1, A2), (("1", 0.5),), "other versions"),
        ((A1, B1), (("2", 0.5),), "other versions"),
        ((A1, A2, A3), (("2", 0.5), ("3", 0.5)), "1 or more"),
    ],
)
def test_what_contradicts_itself_is_refused(models, canaries, says) -> None:
    with pytest.raises(ValueError, match=says):
        Lineup(models=models, canaries=[Canary(version=version, share=share) for version, share in canaries])
