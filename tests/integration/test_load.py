"""Load on a real endpoint: what is asked, when, and what is said of the answers."""

import re

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from diffusion.serving import load
from diffusion.serving.engine import Engine
from diffusion.serving.keys import Access, add
from flows.cli import app
from tests.integration.test_http import LIMITS, served
from tests.random_bundle import random_bundle

TASKS = ("generation", "super-resolution", "inpainting", "colorization", "edit")


@pytest.fixture(scope="module")
def client(one_thread: None):
    with served(Engine(random_bundle(), slots=LIMITS.slots, queue=LIMITS.queue)) as client:
        yield client


def url(client: httpx.Client) -> str:
    return str(client.base_url).rstrip("/")


def test_requests_of_all_tasks_are_answered_and_are_a_function_of_the_seed(client) -> None:
    model = load.model_of(url(client))
    assert load.tasks_of(model) == TASKS
    mix = load.Mix(tasks=TASKS, steps=(2, 3), guidance=(None, 1.0))
    asked = load.asks(model, mix, 25, seed=3)
    assert asked == load.asks(model, mix, 25, seed=3)
    assert asked != load.asks(model, mix, 25, seed=4)
    answers = load.closed_loop(url(client), asked, 3)
    assert [answer.status for answer in answers] == [200] * 25
    found = load.figures(answers)
    assert set(found) == {"all", *TASKS}
    assert found["all"].answered == 25 == sum(each.answered for name, each in found.items() if name != "all")
    assert all(0 < each.p50 <= each.p95 <= each.p99 for each in found.values())
    assert load.refusals(answers) == {}


def test_an_open_loop_does_not_wait_for_answers_and_refusals_are_counted(client) -> None:
    """The endpoint has places for twelve pictures and is asked for forty at once."""
    model = load.model_of(url(client))
    asked = load.asks(model, load.Mix(tasks=("generation",), steps=(60,)), 40)
    heard: list[int] = []
    answers = load.open_loop(url(client), asked, 1_000.0, progress=lambda done, total: heard.append(done))
    refused = load.refusals(answers)
    assert set(refused) == {503}
    assert load.figures(answers)["all"].answered == 40 - refused[503] >= 12
    assert all(answer.retry_after for answer in answers if answer.status == 503)
    assert heard[-1] == 40


def test_the_quantiles_are_those_of_the_sorted_times() -> None:
    seconds = np.random.default_rng(0).permutation(np.arange(1.0, 201))
    found = load.figures([load.Answer("edit", 200, second, False) for second in seconds])
    assert found["all"] == (200, 100, 190, 198)
    assert load.figures([load.Answer("edit", 503, 1.0, True), load.Answer("edit", 0, 1.0, False)]) == {}


def test_the_command_says_it_and_names_mistakes(client, tmp_path, capfd) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["bench-serve", "--home", str(tmp_path), *arguments])
        said = capfd.readouterr()
        return done.exit_code, done.output + said.out + said.err

    code, told = run("--url", url(client), "--requests", "6", "--steps", "2", "--clients", "2", "--task", "edit")
    assert code == 0, told
    assert re.search(r"tiny version 3", told)
    assert re.search(r"edit +6 +\d", told)
    code, told = run("--url", url(client), "--requests", "2", "--steps", "1", "--task", "edit")
    assert (code, "2 of 2 ended with status 422: steps=1" in " ".join(told.split())) == (0, True), told
    for arguments, says in (
        (("--rate", "1", "--clients", "2"), "give one of the two"),
        (("--url", url(client), "--task", "upscaling"), "can be asked for generation, super-resolution"),
        (("--url", "http://127.0.0.1:9"), "does not answer"),
        (("--url", "ftp://127.0.0.1"), "is no address of an endpoint"),
        (("--url", "http://127.0.0.1:99999"), "is no address of an endpoint"),
    ):
        code, told = run(*arguments)
        assert (code, says in " ".join(told.split())) == (2, True), told
    assert not list(tmp_path.iterdir())


def test_a_key_is_sent_where_one_is_wanted(tmp_path) -> None:
    access = Access(keys=tmp_path / "keys.json")
    secret = add(access.keys, "load")
    with served(Engine(random_bundle(), slots=2), access=access) as client:
        with pytest.raises(ValueError, match="wants a key"):
            load.model_of(url(client))
        model = load.model_of(url(client), secret)
        asked = load.asks(model, load.Mix(tasks=("generation",), steps=(2,)), 2)
        assert [answer.status for answer in load.closed_loop(url(client), asked, 1, key=secret)] == [200, 200]
        assert load.refusals(load.closed_loop(url(client), asked, 1)) == {401: 2}
