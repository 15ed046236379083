"""`diffusion plan`: a table for people, JSON for programs, and what it refuses."""

import json
import os
from pathlib import Path

import pytest

from diffusion.planning.foretell import Where, foretell
from diffusion.planning.probe import NoProbe, disk_bytes_s, probe
from diffusion.planning.stages import compared
from diffusion.recipe import Recipe
from flows import recipes
from flows.plan_notes import learn, noted, starts_of
from flows.plan_told import duration
from flows.site import Site
from tests.commands import command, on
from tests.test_planning import RATES, line_of

CLUSTER = ("--preset", "imagenet64", "--pictures", 1_281_167, "--gigabytes", 140, "--no-probe", "--device", "h100")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = Site(home=tmp_path / "home", gpu=False, workers=2)
    on(site, monkeypatch, "cli_plan")
    return site


def planned(*arguments: object) -> dict:
    code, said = command("plan", *arguments, "--json")
    assert code == 0
    return json.loads(said)


def test_a_run_on_gpus_that_are_not_here_is_planned_by_formula(site: Site, monkeypatch: pytest.MonkeyPatch):
    eight = site.model_copy(update={"workers": 8})
    on(eight, monkeypatch, "cli_plan")
    found = planned(*CLUSTER)
    train = next(stage for stage in found["stages"] if stage["name"] == "train")
    # 34 EFLOP at 40 % of eight H100s: three hours, as the preset says
    assert 2.5 * 3_600 < train["seconds"] < 3.5 * 3_600
    assert found["cost"] == 0
    priced = planned(*CLUSTER, "--gpu-hour", 2.0, "--gb-month", 0.02)
    assert priced["cost"] > 8 * 2.0 * train["seconds"] / 3_600
    assert not (site.home / "plans").exists(), "a plan for another machine is none of this one's runs"


def test_a_run_here_is_planned_from_its_pictures_and_noted(site: Site, emoji_folder: Path):
    code, said = command("plan", "--preset", "smoke", "--source", emoji_folder, "--no-probe")
    assert code == 0
    rows = [line.split() for line in said.splitlines()]
    assert [row[0] for row in rows if row].index("stage") < [row[0] for row in rows if row].index("deploy")
    assert "waits for  starting programs" in said
    assert "60 listed, 0 of them decoded" in said
    recipe = recipes.merged("smoke")
    assert noted(recipe, str(emoji_folder), site).how == "by formula"
    assert noted(recipe, "elsewhere", site) is None
    assert noted(recipe, str(emoji_folder), site.model_copy(update={"workers": 4})) is None


def test_failing_workers_cost_more_the_more_there_are(site: Site, monkeypatch: pytest.MonkeyPatch):
    lost = []
    for workers in (8, 256):
        on(site.model_copy(update={"workers": workers}), monkeypatch, "cli_plan")
        lost.append(planned(*CLUSTER, "--mtbf-hours", 1_000)["failures"])
    assert lost[0]["mtbf_s"] == pytest.approx(32 * lost[1]["mtbf_s"])
    assert lost[0]["best_lost"] < lost[1]["best_lost"] <= lost[1]["own_lost"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--pictures", 5, "--source", "x"), "give one of the two"),
        (("--gigabytes", 5), "goes with --pictures"),
        (("--until", "train"), "register, deploy"),
        (("--pictures", 5, "--device", "rtx"), "known are a100"),
        (("--pictures", 5, "--device", "h100", "--mfu", 4), "a share of what the device could do"),
    ],
)
def test_what_makes_no_sense_is_refused(site: Site, given: tuple, says: str):
    with pytest.raises(ValueError, match=says):
        command("plan", "--preset", "smoke", *given)


def test_a_probe_takes_real_steps_on_processes_that_work_at_once(tiny_recipe: Recipe):
    found = probe(
        tiny_recipe, resolution=32, classes=3, world=2, share=4, step_flops=1e8, threads=1, gpu=False, budget_s=0.3
    )
    assert found.world == 2
    assert len(found.step_s) >= 3
    assert all(0 < seconds < 30 for seconds in (*found.step_s, found.start_s, found.answer_s, found.feature_s))
    assert 0 < found.core <= 1


def test_a_network_that_cannot_be_tried_is_no_end_of_a_plan(tiny_recipe: Recipe):
    broken = tiny_recipe.train.model_copy(update={"precision": "fp8"})
    recipe = tiny_recipe.model_copy(update={"train": broken})
    with pytest.raises(NoProbe, match="could not be tried here"):
        probe(recipe, resolution=32, classes=3, world=1, share=4, step_flops=1e8, threads=1, gpu=False, budget_s=0.3)


def test_the_disk_is_measured_and_left_as_it_was(tmp_path: Path):
    assert disk_bytes_s(tmp_path / "not" / "there") > 0
    assert list(tmp_path.iterdir()) == []
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(NoProbe, match="cannot be written"):
            disk_bytes_s(tmp_path)


def test_what_stages_took_to_start_here_is_what_the_next_plan_says(site: Site, tiny_recipe: Recipe):
    (site.home / "plans").mkdir(parents=True)
    where, line = Where(workers=2, cpus=2), line_of(tiny_recipe)
    first = foretell(line, where, RATES, starts=starts_of(site))
    stage = first.stage("train")
    for start_s in (8.0, 40.0, 12.0):
        learn(first, compared(first, {"train": stage.working + start_s}), site)
    second = foretell(line, where, RATES, starts=starts_of(site))
    assert second.stage("train").seconds == pytest.approx(stage.working + 12)
    assert second.stage("evaluate") == first.stage("evaluate")
    by_formula = first.model_copy(update={"how": "by formula"})
    learn(by_formula, compared(by_formula, {"evaluate": 1.0}), site)
    assert set(starts_of(site)) == {"train"}, "of work that was not measured nothing is learnt"


def test_durations_are_for_people():
    shown = [duration(seconds) for seconds in (8.13, 307, 26_000, 1e6)]
    assert shown == ["8.1 s", "5:07", "7.2 h", "11.6 days"]
