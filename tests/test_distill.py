"""distill.py and what is built on it: a lesson has a closed form, a student's run is exact, it draws in one way alone."""

import math
import re
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion.analytic import GaussianMixture
from diffusion.denoiser import Denoiser
from diffusion.density import density_of
from diffusion.distill import answer_of, asked, segments, student_levels, taught
from diffusion.evaluation.gate.gate import verdict
from diffusion.evaluation.measure import evaluate
from diffusion.evaluation.report.report import load_report
from diffusion.flops import training_flops, unet_flops
from diffusion.guidance import classifier_free
from diffusion.recipe import DistillRecipe, Lesson, Recipe, SamplingRecipe, TrainRecipe, student_of
from diffusion.sampler import SAMPLERS, ddim, run
from diffusion.schedule import exponential_sigmas
from diffusion.serving.engine import Engine
from diffusion.serving.job import converse
from diffusion.serving.receipt import pixels_sha256
from diffusion.serving.request import GenerateRequest, RequestError, resolve
from diffusion.store.bundle import Bundle, export_bundle, load_bundle, load_model
from diffusion.store.bundle_spec import bundle_path
from diffusion.store.refs import RunRef
from diffusion.training import checkpoint
from diffusion.training.corrupt import corrupt
from diffusion.training.step import TrainState, build_state, train_step
from diffusion.training.warm_start import check_teacher
from flows.recipes import merged
from tests.evaluated_run import make_run
from tests.random_bundle import random_denoiser
from tests.test_checkpoint import DATASET
from tests.test_gate import GATE, IDENTITY, report
from tests.test_step import CLASSES, CPU, RECIPE, bits_of, emoji, part  # noqa: F401  (emoji is a fixture)
from tests.words import words

pytestmark = pytest.mark.usefixtures("one_thread")

STUDENT = SamplingRecipe(sampler="ddim", steps=4, guidance=1, spacing="exponential", sigma_min=0.5)
LESSON = Lesson(teacher="7" * 64, by=SamplingRecipe(steps=12), student=STUDENT)
LEARNING = RECIPE.model_copy(update={"lesson": LESSON, "label_drop": 0.2})
SHAPE = (3, 4, 4)


def lesson_of(steps: int, guidance: float = 2.5, sampler: str = "dpmpp_2m") -> Lesson:
    by = SamplingRecipe(sampler=sampler, steps=steps, guidance=guidance, sigma_min=0.002)
    return LESSON.model_copy(update={"by": by})


def labelled(centres: Tensor, std: float) -> Denoiser:
    """The exact denoiser of pictures that are Gaussian around a centre of their class."""

    def denoise(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        one = torch.ones(1, dtype=x.dtype)
        classes = [GaussianMixture(one, centre.expand(1, *SHAPE), one * std) for centre in centres]
        answers = torch.stack([mixture.denoise(x, sigma.to(x)) for mixture in classes])
        return answers[label, torch.arange(len(label))]

    return denoise


CENTRES, STD = torch.tensor([-0.5, 0.3, 0.1], dtype=torch.float64).view(3, 1, 1, 1), 0.4  # the last: of no class
LABEL = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])
COND, NULL = {"label": LABEL}, {"label": torch.full_like(LABEL, 2)}


def operands() -> tuple[Tensor, Tensor]:
    """Unit noise, and the levels, two rows at each."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, *SHAPE, dtype=torch.float64, generator=generator)
    return noise, student_levels(LESSON)[:-1].repeat(2)


def noised() -> tuple[Tensor, Tensor]:
    """x of the pictures' class at these levels."""
    noise, sigma = operands()
    return CENTRES[LABEL] + sigma.view(-1, 1, 1, 1) * noise, sigma


def solution(x: Tensor, sigma: float, following: float, centre: Tensor) -> Tensor:
    """Where dx/dsigma = (x - D) / sigma leads for a Gaussian: distances from the centre shrink as the whole spread does."""
    return centre + (x - centre) * math.sqrt((following**2 + STD**2) / (sigma**2 + STD**2))


def exact_student(guidance: float) -> Denoiser:
    """The student that has learned all there is to learn from `labelled`: guidance moves the centre, and nothing else."""
    levels = student_levels(LESSON).double().tolist()

    def denoise(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        answers = []
        for row, level, c in zip(x, sigma.tolist(), label.tolist(), strict=True):
            following = levels[levels.index(level) + 1]
            centre = CENTRES[2] + guidance * (CENTRES[c] - CENTRES[2])
            answers.append(answer_of(solution(row, level, following, centre), row, level, following))
        return torch.stack(answers)

    return denoise


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_lesson_is_the_solution_of_the_teachers_guided_equation_to_second_order(guidance):
    x, sigma = noised()
    exact, teacher = exact_student(guidance), labelled(CENTRES, STD)

    def error(steps: int, sampler: str) -> float:
        target = taught(teacher, x, sigma, COND, NULL, lesson_of(steps, guidance, sampler))
        return (target - exact(x, sigma, LABEL)).abs().max().item()

    assert error(400, "dpmpp_2m") < 2e-4

    def order(sampler: str) -> float:
        return math.log2(error(100, sampler) / error(400, sampler)) / 2

    # not to the digit: the levels of the student stand between the teacher's, whose first steps differ in length
    assert order("dpmpp_2m") > 1.7
    assert order("ddim") == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("interval", [(0.0, math.inf), (0.5, 5.0)])
def test_what_a_teacher_is_asked_is_its_steps_guided_where_guidance_acts(interval):
    """dpmpp_2m asks once a step, and twice the rows within the interval; the step costs the student three passes more."""
    by = LESSON.by.model_copy(update={"guidance_interval": interval})
    lesson = LESSON.model_copy(update={"by": by})
    rows = sum(
        2 if interval[0] <= level <= interval[1] else 1 for way in segments(lesson) for level in way[:-1].tolist()
    )
    assert asked(lesson) == Fraction(rows, 4)
    student = LEARNING.model_copy(update={"lesson": lesson})
    assert training_flops(student, side=16) == (3 + asked(lesson)) * unet_flops(student.unet, resolution=16)


def test_a_student_that_has_learned_its_lesson_draws_what_its_teacher_draws():
    noise, _ = operands()
    levels = student_levels(LESSON)
    x = noise * levels[0]
    drawn = run(ddim(x, levels), lambda x, sigma: exact_student(2.5)(x, sigma, LABEL))
    fine = exponential_sigmas(120, sigma_min=1e-3, sigma_max=levels[0].item())
    many = run(classifier_free(SAMPLERS["heun"](x, fine), COND, NULL, 2.5), labelled(CENTRES, STD))
    torch.testing.assert_close(drawn, many, atol=2e-3, rtol=0)


def test_a_row_learns_what_it_would_alone_and_one_step_of_it_ends_where_the_teachers_steps_do():
    x, sigma = noised()
    levels, teacher = student_levels(LESSON).tolist(), labelled(CENTRES, STD)
    target = taught(teacher, x, sigma, COND, NULL, LESSON)
    for i, place in enumerate(levels.index(level) for level in sigma.tolist()):
        row = slice(i, i + 1)
        way = SAMPLERS["dpmpp_2m"](x[row], segments(LESSON)[place])
        end = run(classifier_free(way, {"label": LABEL[row]}, {"label": NULL["label"][row]}, 2.5), teacher)
        step = ddim(x[row], torch.tensor(levels[place : place + 2]))
        torch.testing.assert_close(run(step, lambda *_, row=row: target[row]), end)


def test_the_teachers_steps_go_from_each_level_of_the_student_to_the_next_along_its_own():
    ways = segments(LESSON)
    assert [(way[0].item(), way[-1].item()) for way in ways] == list(pairwise(student_levels(LESSON).tolist()))
    assert all(bool((way[:-1] > way[1:]).all()) for way in ways)
    assert 12 <= sum(len(way) - 1 for way in ways) <= 12 + len(ways)
    assert [len(way) - 1 for way in segments(lesson_of(2))] == [1, 1, 1, 2]  # 80 and 0.1: at an end and below the last


def student_state(recipe: TrainRecipe = LEARNING, teacher: Denoiser | None = None) -> TrainState:
    teacher = teacher or teaching()
    return build_state(recipe, resolution=16, classes=CLASSES, device=CPU, teacher=teacher)


def teaching() -> Denoiser:
    return random_denoiser("fp32", unet=RECIPE.unet)


def test_a_student_starts_as_its_teacher_and_learns_at_its_own_levels_alone(emoji):  # noqa: F811
    state, teacher = student_state(), teaching()
    own = dict(state.net.named_parameters())
    assert all(torch.equal(own[name], weight) for name, weight in teacher.named_parameters())
    before = [weight.clone() for weight in state.teacher.parameters()]
    sigma = corrupt(emoji, LEARNING, CLASSES, CPU).sigma
    assert set(sigma.tolist()) <= set(student_levels(LESSON)[:-1].tolist())
    losses = [train_step(state, emoji, LEARNING).losses.mean().item() for _ in range(8)]
    assert losses[-1] < 0.85 * losses[0]
    assert all(map(torch.equal, before, state.teacher.parameters()))
    with pytest.raises(AssertionError):
        build_state(LEARNING, resolution=16, classes=CLASSES, device=CPU)


def test_a_step_weighs_the_error_of_the_answer_that_leads_where_the_guided_teacher_leads(emoji):  # noqa: F811
    x0, noise, sigma, label, *_ = corrupt(emoji, LEARNING, CLASSES, CPU)
    assert CLASSES in label.tolist()  # some are drawn without a class
    x, teacher = x0 + sigma.view(-1, 1, 1, 1) * noise, teaching()
    null = {"label": torch.full_like(label, CLASSES)}
    target = taught(teacher, x, sigma, {"label": label}, null, LESSON)
    error = (teacher(x, sigma, label) - target).square().mean(dim=(1, 2, 3))  # the student still answers as its teacher
    expected = error * (sigma**2 + 0.25) / (0.25 * sigma**2)
    torch.testing.assert_close(train_step(student_state(), emoji, LEARNING).losses, expected)


def test_every_level_is_learned_equally_often():
    u = (torch.arange(1_000) + 0.5) / 1_000
    found = density_of(LEARNING)(u)
    assert (found[1:] >= found[:-1]).all()
    assert found.unique(return_counts=True)[1].tolist() == [250] * 4


def test_a_students_loss_is_that_of_its_share_whoever_else_is_in_the_batch(emoji):  # noqa: F811
    whole = train_step(student_state(), emoji, LEARNING).losses
    parts = [train_step(student_state(), part(emoji, rows), LEARNING).losses for rows in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-4)


def test_a_student_resumed_from_its_checkpoint_is_the_uninterrupted_one(emoji, tmp_path: Path):  # noqa: F811
    facts = checkpoint.facts_of(LEARNING, DATASET, world=1, device=CPU)
    batches = [emoji._replace(index=emoji.index + 12 * i) for i in range(4)]
    whole = student_state()
    for batch in batches:
        train_step(whole, batch, LEARNING)
    first = student_state()
    for batch in batches[:2]:
        train_step(first, batch, LEARNING)
    checkpoint.save(first, folder := tmp_path / "000000000024", facts)
    assert not any("teacher" in name for name in load_file(folder / checkpoint.WEIGHTS_NAME))
    resumed = student_state()
    checkpoint.load(folder, resumed, facts)
    for batch in batches[2:]:
        train_step(resumed, batch, LEARNING)
    assert bits_of(resumed) == bits_of(whole)
    other = LEARNING.model_copy(update={"lesson": LESSON.model_copy(update={"teacher": "8" * 64})})
    with pytest.raises(ValueError, match=r"train\.lesson\.teacher is '7777"):
        checkpoint.load(folder, student_state(), checkpoint.facts_of(other, DATASET, world=1, device=CPU))


class Line(NamedTuple):
    """A teacher and its student, and the store they lie in."""

    recipe: Recipe  # the student's
    teacher: Bundle
    student: Bundle
    run: RunRef  # the student's
    root: Path


@pytest.fixture(scope="module")
def line(emoji_folder, tiny_recipe, tmp_path_factory) -> Line:
    root = tmp_path_factory.mktemp("store")
    whole = tiny_recipe.model_copy(update={"distill": DistillRecipe(steps=3, images=16, warmup_images=0)})
    teacher = exported(make_run(emoji_folder, whole, root), whole, root)
    recipe = student_of(whole, teacher.digest)
    run = make_run(emoji_folder, recipe, root, teacher=load_model(bundle_path(root, teacher.digest))[1])
    return Line(recipe, teacher, exported(run, recipe, root), run, root)


def exported(run: RunRef, recipe: Recipe, root: Path) -> Bundle:
    folder, digest = export_bundle(run, recipe.evaluate.ema, root, recipe.evaluate.sampling)
    return load_bundle(folder, digest=digest)


def test_a_students_bundle_names_its_teacher_and_draws_alone_as_among_others(line):
    spec = line.student.spec
    assert spec.lesson.teacher == line.teacher.digest
    assert spec.lesson.by.guidance == line.teacher.spec.sampling.guidance
    engine, label = Engine(line.student, slots=4), spec.classes[0]
    asked = []
    (alone,), (twins) = engine.generate(
        [GenerateRequest(label=label, seed=0), GenerateRequest(label=label, seed=0, n=2)],
        progress=lambda done, total: asked.append(total),
    )
    assert asked[-1] == 3 * 3  # an evaluation for each step of each picture, guidance included
    assert engine.self_test() == pixels_sha256(alone) == pixels_sha256(twins[0])
    resolved = resolve(GenerateRequest(label=label, seed=0), spec)
    by_hand = run(converse(resolved, range(1), line.student, CPU), line.student.denoiser)
    assert (line.student.pictures(by_hand)[0].numpy() == alone).all()


@pytest.mark.parametrize("asked", [{"steps": 5}, {"guidance": 2.0}, {"sampler": "heun"}])
def test_a_student_refuses_to_draw_in_a_way_that_it_was_not_taught(line, asked):
    (name,) = asked
    with pytest.raises(RequestError, match=f"{name}=.*few-step student.* leave {name} out") as refused:
        resolve(GenerateRequest(label="flags", **asked), line.student.spec)
    assert refused.value.param == name
    own = {name: getattr(line.student.spec.sampling, name)}
    assert resolve(GenerateRequest(label="flags", **own), line.student.spec).steps == 3


def test_a_bundle_must_draw_as_its_student_was_taught(line):
    with pytest.raises(ValueError, match="answers at the noise levels it was taught for"):
        export_bundle(line.run, 0.1, line.root, line.teacher.spec.sampling)


def test_a_student_is_of_its_teachers_network_and_is_shown_what_that_was(line):
    train, spec = line.recipe.train, line.teacher.spec
    check_teacher(train, spec.classes, spec)
    with pytest.raises(ValueError, match=rf"train\.sigma_data is 0\.7, and the teacher {line.teacher.digest[:12]} has"):
        check_teacher(train.model_copy(update={"sigma_data": 0.7}), spec.classes, spec)
    with pytest.raises(ValueError, match="as classes"):
        check_teacher(train, spec.classes[::-1], spec)
    reads = spec.model_copy(update={"text": words("minilm").identity})
    with pytest.raises(ValueError, match=r"train\.text_encoder is None, and the teacher .* has minilm"):
        check_teacher(train, spec.classes, reads)


def test_a_students_report_is_of_its_pictures_alone_and_the_gate_takes_it(line):
    ref = evaluate(line.run, line.recipe.evaluate, line.root)
    measured = load_report(ref.uri, ref.digest)
    assert measured.teacher == line.teacher.digest
    assert measured.held_out == ()
    assert measured.bound is None
    assert measured.frechet.identity.sampling == line.student.spec.sampling
    text = Path(ref.uri, "report.md").read_text()
    assert f"few-step student of model {line.teacher.digest[:12]}" in text
    assert "shard.holdout" not in " ".join(verdict(measured, None, GATE).reasons)
    assert verdict(measured, None, GATE).passed


def student_report(value: float, *, teacher: str = "a", **identity):
    drawn = IDENTITY.model_copy(update={"sampling": STUDENT, **identity})
    made = report(value, model="b", losses=(), identity=drawn)
    return made.model_copy(update={"teacher": teacher * 64})


def test_the_gate_chooses_a_student_that_is_not_much_worse_than_the_champion_that_taught_it():
    # t(0.95, 31 degrees) = 1.6955; the standard errors are 3 and 1.15 x 3
    margin = 1.6955 * math.hypot(3, 1.15 * 3)
    assert verdict(student_report(115 - margin - 0.01), report(100), GATE).passed
    refused = verdict(student_report(115 - margin + 0.01), report(100), GATE)
    assert not refused.passed
    assert re.search(r"in 4 steps against 100 .* in 24: not below 1.15 times", refused.reasons[0])
    strict = GATE.model_copy(update={"max_student_excess": 0.0})
    assert not verdict(student_report(99), report(100), strict).passed


def test_a_student_is_compared_with_its_own_teacher_alone_and_under_equal_conditions():
    other = verdict(student_report(50, teacher="c"), report(100), GATE)
    assert not other.passed
    assert any(reason.startswith("sampling.steps is 4 here and 24") for reason in other.reasons)
    fewer = verdict(student_report(50, samples=64), report(100), GATE)
    assert not fewer.passed
    assert fewer.reasons[0].startswith("samples is 64 here and 512")
    assert not any("sampling" in reason for reason in fewer.reasons[:-1])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"sampler": "ddpm"}, "there is no one result to learn"),
        ({"guidance_kind": "autoguidance"}, "only classifier-free guidance is distilled"),
        ({"sigma_max": 0.3}, "sigma_min=0.5 must be below"),
    ],
)
def test_a_teacher_of_whom_nothing_can_be_learned_is_refused_with_what_to_change(changes, why):
    recipe = Recipe(distill=DistillRecipe(steps=4))
    sampling = recipe.evaluate.sampling.model_copy(update=changes)
    unfit = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"sampling": sampling})})
    with pytest.raises(ValueError, match=why):
        student_of(unfit, "7" * 64)
    with pytest.raises(ValueError, match=r"distill\.steps=4"):
        student_of(Recipe(), "7" * 64)


def test_a_line_without_a_student_has_the_digest_that_it_always_had():
    assert "distill" not in Recipe().model_dump()
    assert "lesson" not in Recipe().train.model_dump()
    few = merged("demo", settings=["distill.steps=4", "evaluate.images=10016"])
    assert few.distill == DistillRecipe(steps=4)
    assert few.train == Recipe().train
    student = student_of(few, "7" * 64)
    assert student.train.lesson.by == few.evaluate.sampling.model_copy(update={"steps": few.distill.teacher_steps})
    assert (student.train.images, student.train.lr) == (few.distill.images, few.distill.lr)
    assert student.evaluate.sampling == student.train.lesson.student
    with pytest.raises(
        ValueError, match=f"init={'0' * 12}: a student starts from the weights of its teacher, {'7' * 12}"
    ):
        TrainRecipe.model_validate({**student.train.model_dump(), "init": "0" * 64})
    assert student.evaluate.images is None  # that was the teacher's
    with pytest.raises(ValueError, match=r"no key 'train\.lesson'"):
        merged("demo", settings=["train.lesson=x"])
