"""`diffusion schedule`: what cannot be is said before anything is started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion.presets import PRESETS
from flows.origin import warm_start
from flows.site import Site
from tests.program import ROOT, Place


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--until", "deploy"), "DIFFUSION_RAY, or let `diffusion deploy --follow 60` serve"),
        (("--set", "shard.holdout=0"), "shard.holdout=0 leaves no pictures"),
        (("--cron", "61 * * * *"), "--cron '61 * * * *': minute, hour, day of the month"),
    ],
)
def test_what_cannot_be_is_no_schedule(tmp_path: Path, options: tuple[str, ...], why: str):
    place = Place(tmp_path)
    command = [sys.executable, "-c", "from flows.cli import main; main()", "schedule", "--preset", "smoke", *options]
    done = subprocess.run(command, cwd=ROOT, env=place.environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    assert why in done.stderr
    assert not (place.home / "logs" / "prefect-server.log").exists()


def test_what_is_no_cron_line_or_zone_is_named_with_what_is(tmp_path):
    program = """
from flows.scheduled import schedule_of
assert schedule_of("30 */6 * * 1-5", "Europe/Berlin").timezone == "Europe/Berlin"
for cron, zone in (("x", "UTC"), ("61 * * * *", "UTC"), ("", "UTC"), ("* * *", "UTC"), ("0 3 * * *", "Nowhere/Town")):
    try:
        schedule_of(cron, zone)
    except ValueError as error:
        assert type(error) is ValueError
        print(error)
    else:
        raise AssertionError((cron, zone))
"""
    environment = os.environ | {"PREFECT_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert all("every night at three" in line for line in said[:4])
    assert said[4].startswith("--timezone Nowhere/Town")


def test_warm_is_one_way_to_start_among_others(tmp_path):
    recipe = PRESETS["smoke"]()
    with pytest.raises(ValueError, match=r"leave out --init and train\.init, or --warm"):
        warm_start(recipe, "other", Site(home=tmp_path))
