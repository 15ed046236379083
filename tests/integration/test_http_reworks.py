"""Restorations, edits, variations and streams on a real server and a real socket."""

import base64
import io
import json
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from openai import OpenAI, UnprocessableEntityError
from PIL import Image

from diffusion.adapters.http import MAX_UPLOAD_BYTES
from diffusion.data.images import decode_png
from diffusion.lineage.replay import remake
from diffusion.serving.engine import Engine
from diffusion.serving.given import Given
from diffusion.serving.receipt import ReworkReceipt, opened
from tests.integration.test_http import LIMITS, error_of, idle, served
from tests.random_bundle import CLASSES, RESOLUTION, random_bundle, restoring_bundle

HALF = RESOLUTION // 2
VALUES = np.random.default_rng(0).integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


PICTURE = png(Image.fromarray(VALUES))
SMALL = png(Image.fromarray(VALUES[:4, :4]))
WHITE = np.zeros((RESOLUTION, RESOLUTION), dtype=np.uint8)
WHITE[:, HALF:] = 255
MASK = png(Image.fromarray(WHITE))
CLEAR = png(
    Image.merge("RGBA", (*Image.fromarray(VALUES).split(), Image.fromarray(255 - WHITE)))
)  # as OpenAI's masks are


@pytest.fixture(scope="module")
def engine(one_thread: None) -> Engine:
    return Engine(random_bundle(), slots=LIMITS.slots, queue=LIMITS.queue, timeout_s=LIMITS.timeout_s)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[httpx.Client]:
    with served(engine) as client:
        yield client


@pytest.fixture(scope="module")
def openai(client: httpx.Client) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as openai:
        yield openai


def post(
    client: httpx.Client, path: str, *, image: bytes = PICTURE, mask: bytes | None = None, **fields
) -> httpx.Response:
    files = {"image": ("p.png", image)} | ({} if mask is None else {"mask": ("m.png", mask)})
    return client.post(f"/v1/images/{path}", files=files, data={name: str(value) for name, value in fields.items()})


def first(answer: httpx.Response) -> tuple[bytes, ReworkReceipt]:
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    found = opened(data)
    assert found.intact
    return data, found.receipt


def again(data: bytes, engine: Engine, given: bytes = PICTURE, mask: bytes | None = None) -> bool:
    """Whether the picture is the one that its receipt and the given one make, alone."""
    found = opened(data)
    drawn = remake(found.receipt, engine, Given.of(given, "image"), mask and Given.of(mask, "mask"))
    return np.array_equal(drawn, found.picture)


def test_super_resolution_keeps_the_means_of_the_small_picture(client, engine) -> None:
    answer = post(client, "restorations", image=SMALL, task="super-resolution", factor=4, steps=3, seed=1, n=2)
    data, receipt = first(answer)
    assert (receipt.task, receipt.factor, receipt.way, receipt.seed) == ("super-resolution", 4, "zero-shot", 1)
    means = decode_png(data).reshape(4, 4, 4, 4, 3).mean(axis=(1, 3))
    assert np.abs(means - VALUES[:4, :4]).max() < 30  # clipped and rounded: the weights are random
    assert [item["consistency"] < 1e-5 for item in answer.json()["data"]] == [True, True]
    assert again(data, engine, SMALL)
    assert answer.headers["x-diffusion-task"] == "super-resolution"


def test_inpainting_keeps_what_is_dark_in_the_mask(client, engine) -> None:
    data, _ = first(post(client, "restorations", task="inpainting", mask=MASK, label=CLASSES[0], steps=3, seed=2))
    assert np.array_equal(decode_png(data)[:, :HALF], VALUES[:, :HALF])
    assert not np.array_equal(decode_png(data)[:, HALF:], VALUES[:, HALF:])
    assert again(data, engine, mask=MASK)


def test_colorization_is_a_bare_picture_where_that_is_wanted(client) -> None:
    answer = post(client, "restorations", task="colorization", steps=3, response_format="png")
    assert answer.headers["content-type"] == "image/png"
    assert opened(answer.content).receipt.task == "colorization"


def test_a_model_that_learned_to_restore_does_so_its_own_way(one_thread) -> None:
    with served(Engine(restoring_bundle(("colorization",)), slots=4, queue=8)) as client:
        card = client.get("/v1/models").json()["data"][0]
        assert card["trained_restorations"] == ["colorization"]
        assert card["factors"] == [2, 4, 8]
        _, receipt = first(post(client, "restorations", task="colorization"))
        assert (receipt.way, receipt.steps) == ("trained", 2)


def test_an_edit_changes_towards_a_class_and_a_variation_is_of_nothing_else(client, engine) -> None:
    edited, receipt = first(post(client, "edits", label=CLASSES[1], strength=0.5, steps=4, seed=3))
    assert (receipt.command, receipt.strength, receipt.label) == ("edit", 0.5, CLASSES[1])
    assert again(edited, engine)
    inverted, receipt = first(post(client, "edits", label=CLASSES[1], from_label=CLASSES[0], steps=4, seed=3))
    assert receipt.from_label == CLASSES[0]
    assert again(inverted, engine)
    answer = post(client, "variations", n=3, steps=4, seed=4)
    pictures = [base64.b64decode(item["b64_json"]) for item in answer.json()["data"]]
    assert len({opened(data).receipt.pixels_sha256 for data in pictures}) == 3
    assert again(pictures[2], engine)


@pytest.mark.parametrize(
    ("path", "fields", "files", "param", "said"),
    [
        ("restorations", {"task": "upscaling"}, {}, "task", "super-resolution, inpainting, colorization"),
        ("restorations", {"task": "super-resolution"}, {}, "factor", "factor is missing"),
        ("restorations", {"seed": "1"}, {}, "task", "task is missing; allowed: super-resolution"),
        ("restorations", {"task": "super-resolution", "factor": "two"}, {}, "factor", "whole number"),
        ("restorations", {"task": "inpainting"}, {}, "mask", "mask is missing"),
        ("restorations", {"task": "colorization"}, {"mask": MASK}, "mask", "it is for inpainting"),
        ("restorations", {"task": "inpainting"}, {"mask": SMALL}, "mask", "the mask is 4 x 4, the picture 16 x 16"),
        ("restorations", {"task": "colorization", "n": 7}, {}, "n", "1 to 6"),
        ("restorations", {"task": "colorization", "stepz": 7}, {}, "stepz", "did you mean 'steps'"),
        ("restorations", {"task": "colorization"}, {"image": b"none"}, "image", "cannot be read as a picture"),
        (
            "restorations",
            {"task": "colorization", "image": "text"},
            {"image": None},
            "image",
            "is a file, as `-F image=@",
        ),
        ("restorations", {"task": "colorization"}, {"image": None}, "image", "image is missing"),
        ("restorations", {"task": "colorization", "way": "trained"}, {}, "way", "trained for no restoration"),
        ("edits", {"strength": 0}, {}, "strength", "above 0"),
        ("edits", {"prompt": "a dog"}, {}, "prompt", "give one of its classes"),
        ("edits", {"size": "1024x1024"}, {}, "size", "auto"),
        ("edits", {"partial_images": 1}, {}, "partial_images", "they come in a stream"),
        ("edits", {"stream": "true", "response_format": "png"}, {}, "response_format", "a stream of events"),
        ("edits", {"stream": "perhaps"}, {}, "stream", "neither true nor false"),
        ("variations", {}, {"mask": MASK}, "mask", "mask is no file here: files are image"),
        ("variations", {"from_label": "bird"}, {}, "from_label", "its classes are"),
    ],
)
def test_mistakes_are_422_with_what_is_allowed(client, path, fields, files, param, said) -> None:
    sent = {name: data for name, data in ({"image": PICTURE} | files).items() if data is not None}
    answer = (
        client.post(
            f"/v1/images/{path}",
            files={name: (None if isinstance(data, str) else f"{name}.png", data) for name, data in sent.items()}
            or {"x": b""},
            data={name: str(value) for name, value in fields.items()},
        )
        if sent
        else client.post(f"/v1/images/{path}", files={name: (None, str(value)) for name, value in fields.items()})
    )
    assert answer.status_code == 422, answer.text
    assert error_of(answer)["param"] == param
    assert said in error_of(answer)["message"]


def test_what_is_no_form_or_too_large_is_refused(client) -> None:
    path = "/v1/images/edits"
    assert client.post(path, json={}).status_code == 415
    assert client.post(path, content=b"x", headers={"Content-Type": "multipart/form-data"}).status_code == 400
    assert client.post(path, content=b"x", headers={"Content-Type": "multipart/form-data; boundary=b"}).status_code in (
        400,
        422,
    )
    twice = [("image", ("a.png", PICTURE)), ("image", ("b.png", PICTURE))]
    assert error_of(client.post(path, files=twice))["message"].startswith("image is given twice")
    assert error_of(client.post(path, files=[(f"f{i}", b"") for i in range(9)]))
    large = {"image": ("a.png", bytes(MAX_UPLOAD_BYTES))}
    assert client.post(path, files=large).status_code == 413
    other = client.post(path, files={"image": PICTURE}, headers={"Origin": "https://example.org"})
    assert other.status_code == 403
    assert client.get("/healthz").status_code == 200


def events(answer: httpx.Response) -> Iterator[dict]:
    for line in answer.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def test_a_stream_shows_previews_and_ends_with_the_same_picture(client) -> None:
    body = {"label": CLASSES[0], "seed": 5, "steps": 8, "n": 2}
    plain = client.post("/v1/images/generations", json=body).json()["data"]
    with client.stream("POST", "/v1/images/generations", json=body | {"stream": True, "partial_images": 2}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        found = list(events(answer))
    assert [event["type"].rpartition(".")[2] for event in found] == 4 * ["partial_image"] + 2 * ["completed"]
    assert sorted((event["image"], event["partial_image_index"]) for event in found[:4]) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert [event["b64_json"] for event in found[4:]] == [item["b64_json"] for item in plain]
    assert all(decode_png(base64.b64decode(event["b64_json"])).shape == (RESOLUTION, RESOLUTION, 3) for event in found)


def test_a_client_that_leaves_a_stream_frees_its_slots(client, engine) -> None:
    body = {"label": CLASSES[0], "n": 4, "steps": 1000, "stream": True, "partial_images": 3}
    with client.stream("POST", "/v1/images/generations", json=body) as answer:
        assert answer.status_code == 200
        while engine.load()["drawing"] == 0:
            time.sleep(0.01)
    assert idle(engine, 10)


def test_openais_client_generates_edits_with_a_mask_and_streams(openai: OpenAI) -> None:
    made = openai.images.generate(model="tiny", prompt=CLASSES[0], n=2, size="auto", user="somebody")
    assert [opened(base64.b64decode(image.b64_json)).receipt.label for image in made.data] == [CLASSES[0]] * 2
    edited = openai.images.edit(
        image=("p.png", PICTURE), mask=("m.png", CLEAR), prompt=CLASSES[1], extra_body={"steps": 3}
    )
    found = opened(base64.b64decode(edited.data[0].b64_json))
    assert (found.receipt.task, found.receipt.mask_hole) == ("inpainting", "transparent")
    assert np.array_equal(found.picture[:, :HALF], VALUES[:, :HALF])
    assert not np.array_equal(found.picture[:, HALF:], VALUES[:, HALF:])
    kinds = [event.type for event in openai.images.generate(prompt=CLASSES[0], stream=True, partial_images=3)]
    assert kinds == 3 * ["image_generation.partial_image"] + ["image_generation.completed"]
    streamed = openai.images.edit(
        image=("p.png", PICTURE),
        prompt=CLASSES[1],
        stream=True,
        partial_images=1,
        extra_body={"strength": 0.8, "steps": 6},
    )
    assert [event.type for event in streamed] == ["image_edit.partial_image", "image_edit.completed"]
    assert [model.id for model in openai.models.list()] == ["tiny"]
    with pytest.raises(UnprocessableEntityError, match="its classes"):
        openai.images.generate(prompt="a dragon")


def test_a_masked_edit_is_replayed_with_openais_mask(client, engine) -> None:
    data, receipt = first(post(client, "edits", mask=CLEAR, label=CLASSES[0], steps=3, seed=9))
    assert receipt.mask_hole == "transparent"
    assert again(data, engine, mask=CLEAR)
    data, receipt = first(post(client, "edits", mask=MASK, label=CLASSES[0], steps=3, seed=9, strength=0.5))
    assert (receipt.command, receipt.mask_hole) == ("edit", None)
    assert np.array_equal(decode_png(data)[:, :HALF], VALUES[:, :HALF])
    assert again(data, engine, mask=MASK)
