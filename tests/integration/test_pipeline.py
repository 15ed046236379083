"""The whole line through every real part, as a person runs it: a folder of pictures in, a picture out of the endpoint."""

import json
import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np

from diffusion.data.images import encode_png
from diffusion.serving.receipt import read_receipt
from tests.leaks import PLANTED, leaks
from tests.ports import free_port
from tests.program import Place, read_until, running

STAGES = ("shard", "train", "evaluate", "register")


def test_from_a_folder_to_a_picture_over_http(place: Place, emoji_folder: Path) -> None:
    place = replace(place, also=PLANTED)
    port = free_port()
    line = ("run", "--preset", "smoke", "--source", str(emoji_folder), "--port", str(port))
    with running(place, *line) as process:
        said = read_until(process, "Ctrl-C")
        assert "Traceback" not in said
        assert "not done again" not in said
        grid = Path(re.search(r"samples +(\S+)", said)[1])
        assert grid.read_bytes().startswith(b"\x89PNG")
        assert re.search(r"Frechet +[\d.e+]+ ± ", said)
        assert re.search(r"smoke version 1 \(.*champion", said)
        assert re.search(r"serves smoke version 1, \d+ pictures at once", said)
        assert re.search(r"plan +by formula .*, taken .* times\): shard .*, deploy ", said)
        curl = re.search(r"try +(curl .*)", said)[1]

        body = {"label": "flags", "seed": 7, "steps": 3}
        url = f"http://127.0.0.1:{port}/v1/images/generations"
        first = httpx.post(url, json=body, headers={"Accept": "image/png"}, timeout=60)
        assert first.status_code == 200
        receipt = read_receipt(first.content)
        assert (receipt.model, receipt.version, receipt.label, receipt.seed) == ("smoke", "1", "flags", 7)
        several = httpx.post(url, json=body | {"n": 3}, timeout=60).json()["data"]
        assert len(several) == 3
        assert httpx.post(url, json=body | {"label": "dogs"}, timeout=60).status_code == 422

        subprocess.run(curl, shell=True, cwd=place.root, check=True, timeout=60)  # as a person would paste it
        assert read_receipt((place.root / "picture.png").read_bytes()).bundle_digest == receipt.bundle_digest

        assert leaks(PLANTED, [place.root], said) == [], "with Ray's own logs, which go with its end"
        assert list((place.home / "ray").rglob("raylet*"))
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(httpx.post, url, json=body | {"n": 4, "steps": 50}, timeout=60)
            while not httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=60).json()["drawing"]:
                assert not asked.done()
            os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
            assert process.wait(timeout=60) == 0
            assert asked.result().status_code == 200, "what was asked before the end is answered"
    assert place.wait_for_end() == []
    assert place.strays() == []
    assert list((place.home / "ray" / "r").glob("session_2*")) == [], "Ray's files are deleted when all went well"
    assert (place.home / "ray").stat().st_mode & 0o077 == 0

    before = place.published()
    with running(place, *line, "--no-wait") as process:
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
    assert "ends with this command" in said, "an endpoint that is gone is not advertised"
    assert "curl" not in said
    assert "  plan  " not in said, "nothing was done that could be held against a plan"
    for stage in STAGES:
        assert re.search(rf"{stage} +done before, not done again", said), said
    assert place.published() == before
    assert place.wait_for_end() == []
    assert place.strays() == []

    drawn = place.root / "drawn"
    with running(
        place,
        "sample",
        "--name",
        "smoke",
        "--label",
        "flags",
        "--n",
        "2",
        "--seed",
        "7",
        "--steps",
        "3",
        "--out",
        str(drawn),
    ) as process:
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 0, said
    alone = read_receipt((drawn / "flags-7-000.png").read_bytes())
    assert alone.pixels_sha256 == receipt.pixels_sha256, "the endpoint and the command draw the same picture"
    assert json.loads((place.home / "store" / "bundles" / alone.bundle_digest[:16] / "bundle.json").read_text())

    picture = place.root / "picture.png"  # of the endpoint
    for command, told in ((("trace", str(picture)), "  nearest  "), (("verify",), "all as they were written")):
        with running(place, *command) as process:
            said = process.communicate(timeout=120)[0]
        assert process.returncode == 0, said
        assert "! " not in said
        assert "unknown" not in said
        assert told in said
    assert leaks(PLANTED, [place.root]) == []


def test_an_interrupted_training_goes_on_where_it_was_and_a_student_learns_from_it(
    place: Place, emoji_folder: Path
) -> None:
    place = Place(place.root / "Käthe's [1]")  # Ray takes no such path
    place.root.mkdir()
    long = ("--set", "train.images=1024", "--set", "train.checkpoint_images=128")
    student = ("--set", "distill.steps=2", "--set", "distill.images=32", "--set", "gate.max_student_excess=10")
    line = ("run", "--preset", "smoke", "--source", str(emoji_folder), "--until", "register", *long, *student)
    with running(place, *line) as process:
        end = time.monotonic() + 240
        while not list(place.home.glob("store/runs/*/checkpoints/*/manifest.json")):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < end
            time.sleep(0.1)
        process.terminate()  # it alone: its children are for it to end
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 130, said
        assert "interrupted" in said
        assert "Traceback" not in said
    assert place.wait_for_end() == []
    with running(place, *line) as process:
        said = process.communicate(timeout=400)[0]
        assert process.returncode == 0, said
    assert re.search(r"shard +done before", said)
    assert re.search(r"goes on from its checkpoint at [1-9]", said)
    assert re.search(r"model +smoke version 2 \(challenger, champion\)", said)
    assert re.search(r"gate +passed; against the champion, version 1", said)
    assert re.search(r"Frechet distance \S+ in 2 steps against \S+ of the champion, its teacher, in 3", said)
    assert place.wait_for_end() == []
    assert place.strays() == []


def test_a_signal_to_all_processes_ends_sharding_soon_and_it_goes_on(place: Place, tmp_path: Path) -> None:
    """Prefect's temporary server is taken away as well, for which its client would wait for minutes."""
    for i in range(3_000):
        path = tmp_path / f"{i % 3}" / f"{i:04d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode_png(np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)))
    line = ("shard", "--preset", "smoke", "--source", str(tmp_path))
    with running(place, *line) as process:
        while not list(place.home.glob("work/*/blobs/*")):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 130, said
        assert said.count("interrupted. ") == 1
        assert "Traceback" not in said
    assert place.wait_for_end() == []
    with running(place, *line) as process:
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
    assert "of 3,000 files" in said
    assert list(place.home.glob("work/*")) == []
    assert place.wait_for_end() == []
    assert place.strays() == []
