"""The alias `champion` on a real MLflow: one process at a time, one serial order of all that race for it, and back again."""

import signal
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffusion.adapters import mlflow_seat
from diffusion.adapters.mlflow_champion import WITHDRAWN, Overtaken, journal, promote, roll_back
from diffusion.adapters.mlflow_gate import report_of, settle, stands, verdict_of
from diffusion.adapters.mlflow_registry import register
from diffusion.adapters.mlflow_seat import PREFIX, SeatTaken, seat
from diffusion.evaluation.gate.verdict import Check, Verdict
from flows.cli import app
from flows.site import Site
from tests.registered_run import evaluated, sampling

ROOT = Path(__file__).parents[2]


def passed(against: str | None) -> Verdict:
    return Verdict(checks=(Check(name="frechet", passed=True, words="better"),), against=against)


def seats(client, name: str) -> list[str]:
    return [tag for tag in client.get_registered_model(name).tags if tag.startswith(PREFIX)]


def versions(client, name: str, n: int) -> None:
    """A model with n versions that the gate let pass."""
    client.create_registered_model(name)
    for _ in range(n):
        client.create_model_version(name, "somewhere", tags={"verdict": "passed"})


def champion_of(client, name: str) -> str | None:
    version = client.get_registered_model(name).aliases.get("champion")
    return None if version is None else str(version)


def python(program: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# The seat


def test_one_is_in_the_seat_at_a_time(client):
    """What is read, and written a moment later, is lost where two do it at once."""
    client.create_registered_model("counted")
    client.set_registered_model_tag("counted", "count", "0")

    def count() -> None:
        for _ in range(3):
            with seat(client, "counted"):
                now = int(client.get_registered_model("counted").tags["count"])
                client.set_registered_model_tag("counted", "count", str(now + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert client.get_registered_model("counted").tags == {"count": "12"}


KILLED = """
import os, signal, sys
from diffusion.adapters.mlflow_tracking import Tracking, connect
from diffusion.adapters.mlflow_seat import seat
with seat(connect(Tracking.model_validate_json(sys.argv[1])), "left"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_seat_of_a_killed_process_is_free_at_once(client, tracking):
    client.create_registered_model("left")
    process = python(KILLED, tracking.model_dump_json())
    assert process.wait(120) == -signal.SIGKILL
    assert len(seats(client, "left")) == 1
    with seat(client, "left", patience_s=5):
        pass
    assert seats(client, "left") == []


def test_a_process_elsewhere_is_waited_for_until_its_time_is_over(client, monkeypatch):
    client.create_registered_model("elsewhere")

    def there(until: float) -> None:
        claim = mlflow_seat._Claim(number=1, until=until, machine="another", process=1)
        client.set_registered_model_tag("elsewhere", f"{PREFIX}x", claim.model_dump_json())

    there(until=2e12)
    with (
        pytest.raises(SeatTaken, match=r"process 1 of another .* remove the tag seat\.x"),
        seat(client, "elsewhere", patience_s=0.2),
    ):
        pass
    there(until=1e9)
    with seat(client, "elsewhere", patience_s=5) as held:
        held.check()
        monkeypatch.setattr(mlflow_seat, "LEASE_S", 0.0)
        with pytest.raises(SeatTaken, match="was halted"):
            held.check()
    assert seats(client, "elsewhere") == []


# Moving


def test_the_alias_moves_from_the_version_that_was_judged_against_alone(client):
    versions(client, "moved", 3)
    promote(client, "moved", "1", against=None)
    promote(client, "moved", "1", against=None)  # a repeat is no move
    with pytest.raises(Overtaken, match="judged against nobody, and the champion is version 1"):
        promote(client, "moved", "2", against=None)
    promote(client, "moved", "2", against="1")
    with pytest.raises(Overtaken, match="judged against version 1, and the champion is version 2"):
        promote(client, "moved", "3", against="1")
    assert champion_of(client, "moved") == "2"
    assert [(move.source, move.target, move.by) for move in journal(client, "moved")] == [
        (None, "1", "gate"),
        ("1", "2", "gate"),
    ]
    assert seats(client, "moved") == []


RACER = """
import sys
from diffusion.adapters.mlflow_gate import settle
from diffusion.adapters.mlflow_tracking import Tracking
from diffusion.recipe import Recipe
from diffusion.store.refs import EvaluationRef
tracking, evaluation, recipe = sys.argv[1:]
evaluation, recipe = EvaluationRef.model_validate_json(evaluation), Recipe.model_validate_json(recipe)
settle(Tracking.model_validate_json(tracking), evaluation, recipe)
"""


def test_of_all_that_race_the_best_is_champion_and_each_move_follows_the_one_before(
    client, tracking, home, run, tiny_recipe
):
    name, distances = "raced", (12.0, 11.0, 10.0, 9.0)
    recipe = tiny_recipe.model_copy(update={"name": name})
    racing = [
        python(
            RACER,
            tracking.model_dump_json(),
            evaluated(home / "store", run, sampling(20 + i), distance).model_dump_json(),
            recipe.model_dump_json(),
        )
        for i, distance in enumerate(distances)
    ]
    for process in racing:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    found = {str(v.version): v for v in client.search_model_versions(f"name = '{name}'")}
    assert len(found) == len(distances)
    measured = {version: report_of(tracking, name, version).frechet.value for version in found}
    best = min(measured, key=measured.get)
    assert champion_of(client, name) == best
    moves = journal(client, name)
    assert [move.source for move in moves] == [None, *(move.target for move in moves[:-1])]
    assert all(measured[a.target] > measured[b.target] for a, b in pairwise(moves))
    for move in moves:  # what the version says is what it was moved by
        judged = verdict_of(tracking, name, move.target)
        assert judged.passed
        assert judged.against == move.source
    promoted = {move.target for move in moves}
    assert {v for v in found if found[v].tags["verdict"] == "passed"} == promoted
    assert seats(client, name) == []


def test_a_budget_of_time_is_measured_on_the_bundle_as_it_would_be_served(tracking, home, run, tiny_recipe):
    evaluation = evaluated(home / "store", run, sampling(40), 12.0)
    for budget, passes in ((1e-6, False), (1e6, True)):
        gate = tiny_recipe.gate.model_copy(update={"max_latency_s": budget})
        recipe = tiny_recipe.model_copy(update={"name": f"timed-{passes}".lower(), "gate": gate})
        settle(tracking, evaluation, recipe)
        judged = verdict_of(tracking, recipe.name, "1")
        assert judged.passed == passes
        assert judged.checks[-1].name == "latency"
        assert f"all {recipe.serve.slots} slots taken" in judged.checks[-1].words


# Back


def test_rolling_back_goes_to_the_champion_before_and_again_to_the_one_before_that(client):
    versions(client, "back", 4)
    for version, against in (("1", None), ("2", "1"), ("3", "2")):
        promote(client, "back", version, against)
    assert roll_back(client, "back").target == "2"
    assert champion_of(client, "back") == "2"
    assert WITHDRAWN in client.get_model_version("back", "3").tags
    promote(client, "back", "4", against="2")
    assert roll_back(client, "back").target == "2"
    assert roll_back(client, "back").target == "1"
    with pytest.raises(ValueError, match="no champion of 'back' before version 1: name another version with --to"):
        roll_back(client, "back")
    assert [(move.source, move.target) for move in journal(client, "back") if move.by == "rollback"] == [
        ("3", "2"),
        ("4", "2"),
        ("2", "1"),
    ]
    assert roll_back(client, "back", "3").source == "1"  # back again to one that was withdrawn
    assert WITHDRAWN not in client.get_model_version("back", "3").tags
    assert roll_back(client, "back", "1").target == "1"  # over 2, which is withdrawn as well
    assert all(WITHDRAWN in client.get_model_version("back", v).tags for v in ("2", "3", "4"))
    roll_back(client, "back", "3")
    assert roll_back(client, "back").target == "2"  # which was withdrawn: going back to it withdraws 3 nevertheless
    assert WITHDRAWN in client.get_model_version("back", "3").tags
    assert WITHDRAWN not in client.get_model_version("back", "2").tags
    client.delete_registered_model_alias("back", "champion")  # by hand
    assert roll_back(client, "back", "3").source is None
    assert WITHDRAWN not in client.get_model_version("back", "3").tags


def test_going_back_is_refused_where_it_would_go_past_the_gate(client):
    versions(client, "refused", 2)
    with pytest.raises(ValueError, match="'refused' has no champion to roll back from"):
        roll_back(client, "refused")
    promote(client, "refused", "1", None)
    client.set_model_version_tag("refused", "2", "verdict", "refused")
    with pytest.raises(ValueError, match="version 2 of 'refused' was never champion"):
        roll_back(client, "refused", "2")
    with pytest.raises(ValueError, match="has no version '7'"):
        roll_back(client, "refused", "7")
    with pytest.raises(ValueError, match="version 1 of 'refused' is the champion already"):
        roll_back(client, "refused", "1")
    assert champion_of(client, "refused") == "1"


def test_a_version_that_was_withdrawn_is_not_promoted_again_by_registering_it(client, tracking, home, run, tiny_recipe):
    name, store = "withdrawn", home / "store"
    recipe = tiny_recipe.model_copy(update={"name": name})
    first, second = (evaluated(store, run, sampling(30 + i), 12.0 - i) for i in range(2))
    settle(tracking, first, recipe)
    settle(tracking, second, recipe)
    assert champion_of(client, name) == "2"
    roll_back(client, name)
    again = settle(tracking, second, recipe)
    assert champion_of(client, name) == "1"
    assert "`diffusion rollback` withdrew it for version 1" in " ".join(again.reasons)
    with pytest.raises(Overtaken, match="was withdrawn while it was judged"):  # judged before it was withdrawn
        register(tracking, second, passed("1"), name, recipe.evaluate)
    roll_back(client, name, "2")
    settle(tracking, second, recipe)
    assert champion_of(client, name) == "2"


def test_a_verdict_stands_until_the_gate_the_champion_or_a_withdrawal_would_change_it(
    client, tracking, home, run, tiny_recipe
):
    """What is remembered of a registration is not taken for its verdict: that depends on who is champion."""
    recipe, store = tiny_recipe.model_copy(update={"name": "stands"}), home / "store"
    strict = recipe.gate.model_copy(update={"max_frechet": 1.0})
    first = settle(tracking, evaluated(store, run, sampling(50), 12.0), recipe)
    assert stands(tracking, first, recipe.gate)
    assert not stands(tracking, first, strict)
    worse = settle(tracking, evaluated(store, run, sampling(51), 13.0), recipe)
    assert stands(tracking, worse, recipe.gate)
    second = settle(tracking, evaluated(store, run, sampling(52), 11.0), recipe)
    assert [stands(tracking, ref, recipe.gate) for ref in (first, worse, second)] == [False, False, True]
    roll_back(client, "stands")
    assert [stands(tracking, ref, recipe.gate) for ref in (first, worse, second)] == [True, True, False]
    client.delete_registered_model_alias("stands", "champion")
    assert not stands(tracking, first, recipe.gate)
    with pytest.raises(ValueError, match="name a version with --to"):
        roll_back(client, "stands")
    assert roll_back(client, "stands", "1").source is None
    assert stands(tracking, first, recipe.gate)


def test_the_champion_measured_otherwise_says_what_changed_where_its_report_of_before_can_be_read(
    client, tracking, home, run, tiny_recipe
):
    recipe, store = tiny_recipe.model_copy(update={"name": "anew"}), home / "store"
    settle(tracking, evaluated(store, run, sampling(60), 12.0), recipe)
    again = settle(tracking, evaluated(store, run, sampling(60), 40.0, samples=32), recipe)
    assert (again.version, champion_of(client, "anew")) == ("1", "1")
    words = verdict_of(tracking, "anew", "1").checks[1].words
    assert words.endswith("samples is 32 here and 64 in its former report; Frechet distance 40, was 12")
    client.set_tag(client.get_model_version("anew", "1").tags["evaluation_run"], "report_digest", "0" * 64)
    settle(tracking, evaluated(store, run, sampling(60), 41.0, samples=16), recipe)
    assert verdict_of(tracking, "anew", "1").checks[1].words == "it is the champion itself"


# For people


@pytest.fixture
def diffusion(monkeypatch, home):
    """Runs `diffusion ...` here; gives what was said, and a ValueError is the answer."""
    for command in ("guarded", "looking"):
        monkeypatch.setattr(f"flows.cli_models.{command}", lambda work, debug, **given: work(Site(home=home)))

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, arguments)
        if done.exception is not None:
            raise done.exception
        return done.output

    return run


def test_the_commands_list_the_versions_and_roll_back(diffusion, client, tracking, home, run, tiny_recipe):
    recipe = tiny_recipe.model_copy(update={"name": "listed"})
    for i, distance in enumerate((12.0, 11.0, 13.0)):
        settle(tracking, evaluated(home / "store", run, sampling(50 + i), distance), recipe)
    said = diffusion("models", "listed")
    rows = [" ".join(line.split()) for line in said.splitlines()]
    side, digest = recipe.evaluate.extractor_resolution, run.dataset.digest[:8]
    assert rows[0] == "listed"
    assert rows[2].startswith("3 challenger refused 13 ")
    assert rows[3].startswith("2 champion passed 11 ")
    assert rows[4].startswith("1 passed 12 ")
    assert any(row.startswith("Frechet distance 13 against the champion's 11") for row in rows)
    assert f"by {recipe.evaluate.samples} samples, efficientnet-lite0 at {side} px, data {digest}" in rows
    assert rows[-1].endswith("champion from version 1 to version 2, by gate")
    said = diffusion("rollback", "listed")
    assert "listed: the champion is version 1, and not version 2 any more" in said
    assert "`diffusion deploy --name listed` serves version 1" in said
    rows = [" ".join(line.split()) for line in diffusion("models").splitlines()]
    listed = rows[rows.index("listed") :]
    assert listed[3].startswith("2 withdrawn 11 ")
    assert listed[4].startswith("1 champion passed 12 ")
    assert "`diffusion rollback` withdrew it for version 1; with --to it comes back" in diffusion("models", "listed")
    diffusion("rollback", "listed", "--to", "2")
    assert champion_of(client, "listed") == "2"
    for command in ("models", "rollback"):
        with pytest.raises(ValueError, match=r"no model 'nosuch' is registered; there are: .*listed"):
            diffusion(command, "nosuch")
