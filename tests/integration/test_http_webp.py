"""Pictures as WebP, asked for in each way there is."""

import base64
import io
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from openai import OpenAI
from PIL import Image

from diffusion.data.images import decode_all
from diffusion.lineage.replay import outcome, redraw, surroundings
from diffusion.serving.engine import Engine
from diffusion.serving.receipt import format_of, opened, read_receipt
from tests.integration.test_http import LIMITS, URL, error_of, served
from tests.random_bundle import random_bundle

BODY = {"label": "dog", "seed": 3, "steps": 3}


@pytest.fixture(scope="module")
def engine(one_thread: None) -> Engine:
    return Engine(random_bundle(), slots=LIMITS.slots, queue=LIMITS.queue, timeout_s=LIMITS.timeout_s)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[httpx.Client]:
    with served(engine) as client:
        yield client


def test_every_way_to_ask_gives_the_same_file_with_the_pixels_of_the_png(client: httpx.Client, engine: Engine) -> None:
    png = client.post(URL, json=BODY | {"response_format": "png"})
    bare = [
        client.post(URL, json=BODY | {"seed": 3}, headers={"Accept": "image/webp,image/*;q=0.8"}),
        client.post(URL, json=BODY, headers={"Accept": "image/webp"}),
        client.post(URL, json=BODY | {"output_format": "webp"}, headers={"Accept": "image/*"}),
        client.post(
            URL, json=BODY | {"output_format": "webp", "output_compression": 100}, headers={"Accept": "image/webp"}
        ),
    ]
    for answer in bare:
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
        assert answer.content == bare[0].content
        shared = {name for name in png.headers if name.startswith("x-diffusion")}
        assert {name: answer.headers[name] for name in shared} == {name: png.headers[name] for name in shared}
    data = bare[0].content
    told = client.post(URL, json=BODY | {"output_format": "webp"}).json()
    assert (told["output_format"], base64.b64decode(told["data"][0]["b64_json"])) == ("webp", data)
    assert read_receipt(data) == read_receipt(png.content)
    assert np.array_equal(decode_all(data), decode_all(png.content))
    drawn = redraw(opened(data).receipt, engine)
    assert outcome(data, opened(data), drawn, surroundings(engine.device)).same_bytes


def test_openais_client_streams_them(client: httpx.Client) -> None:
    with OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as openai:
        asked = {"prompt": "dog", "output_format": "webp", "stream": True, "partial_images": 1}
        events = list(openai.images.generate(**asked, extra_body={"seed": 3, "steps": 4}))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "completed"]
    for event in events:
        assert event.output_format == "webp"
        assert format_of(base64.b64decode(event.b64_json)) == "webp"


def test_a_webp_that_was_drawn_is_a_picture_to_work_on(client: httpx.Client) -> None:
    given = client.post(URL, json=BODY, headers={"Accept": "image/webp"}).content
    files = {"image": ("drawn.webp", given, "image/webp")}
    answer = client.post("/v1/images/variations", files=files, data={"steps": "4"}, headers={"Accept": "image/webp"})
    assert answer.status_code == 200
    assert Image.open(io.BytesIO(answer.content)).format == "WEBP"


@pytest.mark.parametrize(
    ("body", "accept", "param", "said"),
    [
        ({"output_format": "jpeg"}, "*/*", "output_format", "png, webp"),
        ({"output_format": "webp", "output_compression": 80}, "*/*", "output_compression", "without loss"),
        ({"output_format": "webp", "response_format": "png"}, "*/*", "output_format", "one format"),
        ({"output_format": "png"}, "image/webp", "output_format", "one format"),
        ({"n": 2}, "image/webp", "n", "n=1"),
        ({"response_format": "webp"}, "*/*", "response_format", "b64_json, png"),
    ],
)
def test_what_is_lossy_or_two_things_is_refused_in_words(client, body, accept, param, said) -> None:
    answer = client.post(URL, json=BODY | body, headers={"Accept": accept})
    error = error_of(answer)
    assert (answer.status_code, error["param"]) == (422, param)
    assert said in error["message"]
