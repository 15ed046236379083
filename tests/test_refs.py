import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from diffusion.recipe import canonical_json, digest_of
from diffusion.store.refs import EvaluationRef, ModelRef, RunRef
from tests.made_run import dataset_ref

DATASET = dataset_ref(Path("/data"))
RUN = RunRef(uri="/run", digest="a" * 64, recipe_digest="b" * 64, dataset=DATASET, images_seen=16)
EVALUATION = EvaluationRef(
    uri="/report", digest="c" * 64, bundle_uri="/bundle", bundle_digest="e" * 64, run=RUN, metrics={"frechet": 12.5}
)
MODEL = ModelRef(
    uri="/bundle",
    digest="e" * 64,
    name="demo",
    version="3",
    aliases=("challenger", "champion"),
    run_digest=RUN.digest,
    dataset_digest=DATASET.digest,
    reasons=("the first one, and sane",),
)


@pytest.mark.parametrize("ref", [DATASET, RUN, EVALUATION, MODEL], ids=lambda ref: type(ref).__name__)
def test_round_trip_through_json_keeps_value_and_digest(ref):
    again = type(ref).model_validate_json(canonical_json(ref))
    assert again == ref
    assert digest_of(again) == digest_of(ref)


def test_a_reference_never_changes():
    with pytest.raises(ValidationError, match="frozen"):
        RUN.images_seen = 17
    assert hash(DATASET) == hash(DATASET.model_copy())


def test_unknown_facts_are_refused_by_name():
    with pytest.raises(ValidationError, match="epoch"):
        RunRef.model_validate(json.loads(canonical_json(RUN)) | {"epoch": 3})


def test_a_metric_that_is_no_number_is_refused():
    with pytest.raises(ValidationError, match="frechet"):
        EvaluationRef.model_validate(EVALUATION.model_dump() | {"metrics": {"frechet": float("nan")}})


def test_a_reference_carries_the_whole_lineage():
    assert EVALUATION.run.dataset.digest == MODEL.dataset_digest
    assert EVALUATION.run.digest == MODEL.run_digest
