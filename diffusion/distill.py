"""Distillation: a student that draws in few steps what its teacher draws in many.

The student is a denoiser like any other, asked by `ddim` at a few noise levels alone.  At each its answer T leads in one
step, x_s = T + (s / sigma) (x - T), to where the teacher's deterministic equation, guidance included, leads from x in
several.  So there is no new sampler, and guidance costs the student nothing.  [Salimans & Ho 2022, Sec. 3, of a step of two;
Meng et al. 2023, Sec. 3, of guidance; Heek et al. 2024, of few segments]

Where we differ: the student starts each lesson where its own steps from pure noise have led it [DMD2: Yin et al. 2024,
Sec. 4.5], not at a noised picture.  A guided teacher's pictures are not distributed as the data are, and neither are what
is on the way to them; so the student learns at the places it will be asked at, its own mistakes included.
"""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from diffusion.guidance import Cond, classifier_free, conditioned
from diffusion.recipe import Lesson
from diffusion.sampler import SAMPLERS, Denoise, run
from diffusion.spacing import sampling_sigmas


def student_levels(lesson: Lesson) -> Tensor:
    """The levels of a student, decreasing, then 0.  Returns (n + 1,) float32, as `ddim` asks at them."""
    return sampling_sigmas(lesson.student, lesson.student.steps).float()


def segments(lesson: Lesson) -> list[Tensor]:
    """For each step of the student, the first first, the levels of the teacher's steps in its place: the step's two ends and
    what lies between of the levels of lesson.by.  Float64, decreasing.

    A level less than a third of the teacher's step from an end is left out: where steps are that unequal, the line through
    the last two answers of a multistep sampler says little of what comes.
    """
    grid = sampling_sigmas(lesson.by, lesson.by.steps)[:-1].numpy()
    places = np.arange(len(grid))

    def place(level: float) -> float:
        """In steps of the teacher from its first level."""
        return float(np.interp(-np.log(level), -np.log(grid), places)) if level else math.inf

    ways = []
    for high, low in pairwise(student_levels(lesson).double().tolist()):
        inner = grid[(places > place(high) + 1 / 3) & (places < place(low) - 1 / 3)]
        ways.append(torch.tensor([high, *inner, low], dtype=torch.float64))
    return ways


def answer_of(end: Tensor, x: Tensor, sigma: float, following: float) -> Tensor:
    """The answer T with which one step of `ddim` leads from x at sigma to `end` at `following`: its inverse in T."""
    ratio = following / sigma
    return (end - ratio * x) / (1 - ratio)


@torch.no_grad()
def taught(
    student: Denoise, teacher: Denoise, noise: Tensor, sigma: Tensor, cond: Cond, null: Cond, lesson: Lesson
) -> tuple[Tensor, Tensor]:
    """What each picture is asked, and the answer: x at its level, where the student's own steps lead from the pure noise,
    and T, which leads from there to the end of the teacher's steps.

    noise (B, C, H, W), unit Gaussian; sigma (B,), each one of `student_levels`; cond, null: with the class, and without.
    Returns (x, T), (B, C, H, W) each.
    """
    levels, ways = student_levels(lesson), segments(lesson)
    x, target = noise * levels[0], torch.empty_like(noise)
    for i, (level, following) in enumerate(pairwise(levels.tolist())):
        here = (sigma == levels[i].to(sigma)).nonzero().squeeze(1)
        if len(here):
            end = _led(teacher, x[here], ways[i], _rows(cond, here), _rows(null, here), lesson)
            target[here] = answer_of(end, x[here], level, following)
        below = (sigma < levels[i].to(sigma)).nonzero().squeeze(1)
        if len(below):
            step = conditioned(SAMPLERS["ddim"](x[below], levels[i : i + 2]), _rows(cond, below))
            x[below] = run(step, student)
    return x, target


def _led(teacher: Denoise, x: Tensor, sigmas: Tensor, cond: Cond, null: Cond, lesson: Lesson) -> Tensor:
    """Where the teacher leads from x at sigmas[0]: x at sigmas[-1]."""
    by = lesson.by
    drawing = SAMPLERS[by.sampler](x, sigmas)
    if by.guidance == 1:
        return run(conditioned(drawing, cond), teacher)
    guided = classifier_free(drawing, cond, null, by.guidance, by.guidance_interval, rescale=by.guidance_rescale)
    return run(guided, teacher)


def _rows(cond: Cond, rows: Tensor) -> Cond:
    return {name: value[rows] for name, value in cond.items()}
