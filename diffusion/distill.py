"""Distillation: a student that draws in few steps what its teacher draws in many.

The student is a denoiser like any other, asked by `ddim` at a few noise levels alone.  At each its answer T leads in one
step, x_s = T + (s / sigma) (x - T), to where the teacher's deterministic equation, guidance included, leads from x in
several.  So there is no new sampler, and guidance costs the student nothing.  [Salimans & Ho 2022, Sec. 3, of a step of two;
Meng et al. 2023, Sec. 3, of guidance; Heek et al. 2024, of few segments]
"""

import math
from fractions import Fraction
from functools import lru_cache
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


def taught(teacher: Denoise, x: Tensor, sigma: Tensor, cond: Cond, null: Cond, lesson: Lesson) -> Tensor:
    """What a student is to answer at x (B, C, H, W): T, which leads to where the teacher leads.  (B, C, H, W)

    sigma (B,), each one of `student_levels`, best on the CPU: they are read.  cond, null: a row for each, with the class,
    and without.
    """
    levels, target = student_levels(lesson).tolist(), torch.empty_like(x)
    for way, (level, following) in zip(segments(lesson), pairwise(levels), strict=True):
        rows = (sigma == level).nonzero().squeeze(1).to(x.device, non_blocking=True)
        if len(rows):
            end = _led(teacher, x[rows], way, _rows(cond, rows), _rows(null, rows), lesson)
            target[rows] = answer_of(end, x[rows], level, following)
    return target


@lru_cache(maxsize=4)  # each size of picture asks
def asked(lesson: Lesson) -> Fraction:
    """For how many rows a teacher answers to teach one, guidance included: the mean over the levels, all equally likely."""
    levels, rows = student_levels(lesson)[:-1], 0

    def count(x: Tensor, sigma: Tensor, **_: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return torch.zeros_like(x)

    cond = {"label": torch.zeros(len(levels), dtype=torch.long)}
    taught(count, torch.ones(len(levels), 1, 1, 1), levels, cond, cond, lesson)
    return Fraction(rows, len(levels))


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
