import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.recipe import ShardRecipe, TrainRecipe
from diffusion.store import works
from diffusion.store.refs import DatasetRef, EvaluationRef, RunRef
from diffusion.store.works import STAGE_VERSIONS, recall, remember, work_key, work_path
from tests.made_run import dataset_ref

KEY = work_key("shard", ShardRecipe(), ("a" * 64,))


@pytest.fixture
def dataset(tmp_path: Path) -> DatasetRef:
    folder = tmp_path / "datasets" / "d"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    return dataset_ref(folder)


def test_remember_then_recall_gives_the_reference_again(tmp_path, dataset):
    assert recall(tmp_path, KEY, DatasetRef) is None
    assert remember(tmp_path, KEY, dataset) == dataset
    assert recall(tmp_path, KEY, DatasetRef) == dataset
    assert [path.name for path in (tmp_path / "works").iterdir()] == [f"{KEY}.json"]


@pytest.mark.parametrize("lost", ["the folder", "its manifest"])
def test_recall_gives_none_when_the_result_has_vanished(tmp_path, dataset, lost):
    remember(tmp_path, KEY, dataset)
    if lost == "the folder":
        shutil.rmtree(dataset.uri)
    else:
        Path(dataset.uri, "manifest.json").unlink()
    assert recall(tmp_path, KEY, DatasetRef) is None


def test_an_evaluation_needs_its_bundle_as_well_as_its_report(tmp_path, dataset):
    run = RunRef(uri=dataset.uri, digest="a" * 64, recipe_digest="b" * 64, dataset=dataset, images_seen=8)
    report, bundle = tmp_path / "report", tmp_path / "bundle"
    for path in (report / "report.json", bundle / "bundle.json"):
        path.parent.mkdir()
        path.write_text("{}")
    evaluation = EvaluationRef(
        uri=str(report), digest="c" * 64, bundle_uri=str(bundle), bundle_digest="e" * 64, run=run, metrics={}
    )
    remember(tmp_path, KEY, evaluation)
    assert recall(tmp_path, KEY, EvaluationRef) == evaluation
    shutil.rmtree(bundle)
    assert recall(tmp_path, KEY, EvaluationRef) is None


def test_what_is_not_published_is_not_remembered(tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.json does not exist"):
        remember(tmp_path, KEY, dataset_ref(tmp_path / "nowhere"))
    assert not work_path(tmp_path, KEY).exists()


@pytest.mark.parametrize("damage", ["{", '{"kind": "DatasetRef"}', "another work", "another kind"])
def test_a_file_that_is_not_this_work_is_named(tmp_path, dataset, damage):
    remember(tmp_path, KEY, dataset)
    path = work_path(tmp_path, KEY)
    work = json.loads(path.read_text())
    if damage == "another work":
        damage = json.dumps(work | {"key": "f" * 64})
    elif damage == "another kind":
        damage = json.dumps(work | {"kind": "RunRef"})
    path.write_text(damage)
    with pytest.raises(ValueError, match=rf"{KEY}\.json is not the DatasetRef .*Delete this file"):
        recall(tmp_path, KEY, DatasetRef)


@given(st.sampled_from(sorted(STAGE_VERSIONS)), st.lists(st.text("0123456789abcdef", min_size=1), max_size=3))
def test_the_key_depends_on_everything_that_goes_in(stage, inputs):
    key = work_key(stage, ShardRecipe(), tuple(inputs))
    assert key == work_key(stage, ShardRecipe(), tuple(inputs))
    assert len(key) == 64
    others = [
        work_key(stage, ShardRecipe(resolution=32), tuple(inputs)),
        work_key(stage, TrainRecipe(), tuple(inputs)),
        work_key(stage, ShardRecipe(), (*inputs, "0")),
        *(work_key(other, ShardRecipe(), tuple(inputs)) for other in STAGE_VERSIONS if other != stage),
    ]
    assert len({key, *others}) == 1 + len(others)


def test_the_order_of_inputs_counts():
    assert work_key("evaluate", {}, ("a", "b")) != work_key("evaluate", {}, ("b", "a"))


def test_raising_a_stage_version_makes_its_work_new_and_no_other(monkeypatch):
    train, shard = work_key("train", TrainRecipe()), work_key("shard", ShardRecipe())
    monkeypatch.setitem(works.STAGE_VERSIONS, "train", STAGE_VERSIONS["train"] + 1)
    assert work_key("train", TrainRecipe()) != train
    assert work_key("shard", ShardRecipe()) == shard


def test_an_unknown_stage_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'trian' has no version; there are shard, train"):
        work_key("trian", TrainRecipe())


def _remember_often(store: Path, ref: DatasetRef, times: int) -> None:
    for _ in range(times):
        remember(store, KEY, ref)


def test_readers_never_see_a_part_while_others_write(tmp_path, dataset):
    remember(tmp_path, KEY, dataset)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_remember_often, args=(tmp_path, dataset, 60)) for _ in range(2)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        assert recall(tmp_path, KEY, DatasetRef) == dataset
        reads += 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert reads > 0
    assert list((tmp_path / "works").glob(".tmp-*")) == []
