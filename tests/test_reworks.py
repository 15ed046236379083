"""Restorations and edits in the engine: the same bytes alone and among anything else, and what was measured is kept."""

import io

import numpy as np
import pytest
from PIL import Image

from diffusion.recipe import ServeRecipe
from diffusion.serving.editing import EditRequest, edit
from diffusion.serving.engine import Engine
from diffusion.serving.given import Given
from diffusion.serving.job import Job, together
from diffusion.serving.request import GenerateRequest, RequestError, resolve
from diffusion.serving.restoring import RestoreRequest, restoration
from diffusion.serving.rework import Rework
from diffusion.serving.ticket import Preview
from diffusion.store.bundle import Bundle
from tests.random_bundle import CLASSES, RESOLUTION, guided_bundle, random_bundle, reading_bundle, restoring_bundle
from tests.running_engine import running, same

pytestmark = pytest.mark.usefixtures("one_thread")


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


PICTURE = Given.of(png(np.random.default_rng(0).integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)), "image")
HOLE = np.zeros((RESOLUTION, RESOLUTION), dtype=np.uint8)
HOLE[:, RESOLUTION // 2 :] = 255
MASK = Given.of(png(HOLE), "mask")

RESTORED = [
    (RestoreRequest(task="super-resolution", factor=4, seed=1, n=2, steps=3), None),
    (RestoreRequest(task="inpainting", label=CLASSES[0], seed=2, n=3, steps=4, guidance=2.0, repeats=2), MASK),
    (RestoreRequest(task="colorization", seed=3, steps=5, noise=0.2, way="zero-shot"), None),
    (RestoreRequest(task="colorization", factor=2, seed=4, steps=2), None),
]
EDITED = [
    (EditRequest(label=CLASSES[1], seed=5, n=2, steps=6, strength=0.5, sampler="ddpm"), MASK),
    (EditRequest(label=CLASSES[1], from_label=CLASSES[0], seed=6, steps=4), None),
    (EditRequest(label=CLASSES[0], seed=7, n=2, steps=3, strength=1.0, coarse=4), None),
]


def reworks(engine: Engine) -> list[Rework]:
    bundle, device = engine.bundle, engine.device
    restored = [restoration(asked, PICTURE, mask, bundle, device) for asked, mask in RESTORED]
    return restored + [edit(asked, PICTURE, mask, bundle, device) for asked, mask in EDITED]


def generation(engine: Engine, **fields: object) -> Job:
    return engine.job(resolve(GenerateRequest(**fields), engine.bundle.spec))


@pytest.mark.parametrize(
    "bundle", [random_bundle(), restoring_bundle(("super-resolution", "inpainting")), reading_bundle("fp32")]
)
def test_each_is_the_same_to_the_byte_alone_and_among_others(bundle: Bundle) -> None:
    engine = Engine(bundle, slots=4, queue=64)
    wanted = reworks(engine)
    alone = [engine.draw([rework.job])[0].future.result() for rework in wanted]
    with running(engine):
        others = [generation(engine, label=CLASSES[0], seed=i, n=2, steps=2 + i) for i in range(3)]
        order = np.random.default_rng(1).permutation(len(wanted)).tolist()
        tickets = {i: engine.submit(wanted[i].job) for i in order}
        for job in others:
            engine.submit(job)
        for i, ticket in tickets.items():
            assert same(ticket.future.result(60), alone[i]), wanted[i].facts


def test_each_result_is_another_and_does_not_depend_on_how_many_there_are(one_thread) -> None:
    engine = Engine(random_bundle(), slots=8)
    two, one = (
        engine.draw(
            [restoration(RESTORED[0][0].model_copy(update={"n": n}), PICTURE, None, engine.bundle, engine.device).job]
        )
        for n in (2, 1)
    )
    first, second = two[0].future.result()
    assert np.array_equal(first, one[0].future.result()[0])
    assert not np.array_equal(first, second)


def test_progress_and_the_measurement_are_told() -> None:
    engine = Engine(random_bundle(), slots=3)
    for (asked, mask), repeats in zip(RESTORED, (3, 2, 3, 3), strict=True):
        rework = restoration(asked, PICTURE, mask, engine.bundle, engine.device)
        told: list[tuple[int, int]] = []
        (ticket,) = engine.draw([rework.job], lambda done, total, told=told: told.append((done, total)))
        assert told[-1] == (asked.n * asked.steps * repeats,) * 2
        assert len(ticket.off) == asked.n
        assert asked.noise or max(ticket.off.values()) < 1e-5
    asked, mask = EDITED[1]
    (ticket,) = engine.draw([edit(asked, PICTURE, mask, engine.bundle, engine.device).job])
    assert ticket.off == {}


def test_the_endpoints_limits_hold_for_them_too() -> None:
    bundle, device = random_bundle(), Engine(random_bundle()).device
    limits = ServeRecipe(max_n=2, max_steps=10)
    for asked, says in (
        (RestoreRequest(task="colorization", n=3), "n=3: this server allows 1 to 2"),
        (RestoreRequest(task="colorization", steps=11), "steps=11: this server allows 2 to 10"),
        (
            RestoreRequest(task="colorization", steps=10, repeats=4),
            "repeats=4: with steps=10 this server allows 1 to 3",
        ),
    ):
        with pytest.raises(RequestError, match=says):
            restoration(asked, PICTURE, None, bundle, device, limits)
    with pytest.raises(RequestError, match="n=3: this server allows 1 to 2"):
        edit(EditRequest(n=3), PICTURE, None, bundle, device, limits)


def test_a_file_that_is_no_picture_is_refused_by_its_name() -> None:
    with pytest.raises(RequestError, match="mask cannot be read as a picture") as found:
        Given.of(b"not a picture", "mask")
    assert found.value.param == "mask"


@pytest.mark.parametrize("kind", ["generated", "restored", "edited", "inverted"])
def test_previews_are_the_answers_on_the_way_and_change_nothing(kind: str) -> None:
    engine = Engine(random_bundle(), slots=2)
    job = {
        "generated": lambda: generation(engine, label=CLASSES[0], seed=1, n=3, steps=8, sampler="ddim"),
        "restored": lambda: reworks(engine)[1].job,
        "edited": lambda: reworks(engine)[4].job,
        "inverted": lambda: reworks(engine)[5].job,
    }[kind]()
    n, previews = job.request.n, min(3, job.shown - 1)
    assert previews > 1
    plain = engine.draw([job])[0].future.result()
    seen: list[Preview] = []
    with running(engine):
        ticket = engine.submit(job, previews=3, show=seen.append)
        assert same(ticket.future.result(60), plain)
    assert sorted((preview.image, preview.number) for preview in seen) == [
        (i, k) for i in range(n) for k in range(previews)
    ]
    for image in range(n):
        own = [preview.picture for preview in seen if preview.image == image]
        assert not np.array_equal(own[0], own[1])
        if kind == "restored":  # what is known is in each of them
            assert all(
                np.array_equal(picture[:, : RESOLUTION // 2], plain[image][:, : RESOLUTION // 2]) for picture in own
            )
    with running(engine):  # a preview for each answer but the last, of which there is no more
        few, all_of_them = generation(engine, seed=3, steps=3, sampler="ddim"), []
        engine.submit(few, previews=9, show=all_of_them.append).future.result(60)
    assert [preview.number for preview in all_of_them] == [0, 1]


@pytest.mark.parametrize("bundle", [random_bundle(), guided_bundle("fp32"), reading_bundle("fp32")])
def test_pictures_drawn_in_one_job_are_those_of_jobs_of_their_own(bundle: Bundle) -> None:
    engine = Engine(bundle, slots=4, queue=64)
    for how in ({"steps": 4}, {"steps": 5, "sampler": "ddpm", "guidance": 1.0}):
        asked = [GenerateRequest(label=CLASSES[i % 3], seed=7 * i, **how) for i in range(6)]
        requests = [resolve(one, bundle.spec) for one in asked]
        (ticket,) = engine.draw([together(requests, bundle, engine.device)])
        assert same(ticket.future.result(), [pictures[0] for pictures in engine.generate(asked)])
    with pytest.raises(ValueError, match="drawn in one way"):
        together([requests[0], requests[1].model_copy(update={"steps": 2})], bundle, engine.device)
