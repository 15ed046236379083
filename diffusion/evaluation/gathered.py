"""What an evaluation gathers before it measures: what its workers were told, what they gave, and the features to compare.

Each measured thing stands in a module of its own, with a function that takes this and returns the report's facts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, takewhile

import numpy as np
from torch import Tensor

from diffusion.data.manifest import Manifest
from diffusion.data.reading import Reading
from diffusion.evaluation.extractors.features import ExtractorIdentity
from diffusion.evaluation.metrics.memorization import Looks
from diffusion.evaluation.plan import Draw, Task
from diffusion.recipe import EvaluateRecipe, Frozen
from diffusion.store.bundle_spec import BundleSpec
from diffusion.store.joint_encoders import JointIdentity


class Setup(Frozen):
    """All that a worker must know."""

    bundle_uri: str
    bundle_digest: str
    dataset_uri: str
    dataset_digest: str
    recipe: EvaluateRecipe
    extractor: ExtractorIdentity
    weights: str | None  # of the extractor, where they do not come with the installation
    device: str
    reading: Reading = Reading()
    joint: JointIdentity | None = None  # of the encoder that holds pictures against captions


@dataclass(frozen=True)
class Result:
    """What a task gave, by its kind.  A drawing task whose model gives no pictures says so in `problem`."""

    number: int
    arrays: dict[str, np.ndarray]
    problem: str = ""
    seconds: float = 0.0  # of a drawing task, in its engine: other each time, and in no report

    @property
    def pictures(self) -> list[np.ndarray]:
        """The shown pictures of a drawing task, uint8 (H, W, 3) each."""
        names = (f"picture-{i}" for i in count())
        return [self.arrays[name] for name in takewhile(self.arrays.__contains__, names)]


@dataclass(frozen=True, eq=False)
class Gathered:
    """All that the report is made of, complete: every task has its result.  A function of bundle, dataset and recipe.

    `real` and `drawn` lie in files, and may be more than memory holds in float64: take them in blocks of rows.
    """

    setup: Setup
    manifest: Manifest
    spec: BundleSpec
    draws: tuple[Draw, ...]
    tasks: tuple[Task, ...]
    results: dict[int, Result]  # by the task's number; the features are taken out
    compared: tuple[int, ...]  # the training pictures that the drawn ones are compared with
    real: Tensor  # (R, D) float32, their features
    real_labels: Tensor  # (R,) int64
    real_small: Tensor  # uint8 (R, SIDE, SIDE, 3), their small copies
    control: Looks | None  # held-out pictures, evenly spaced; None: nothing is held out
    control_labels: Tensor  # of these, int64
    drawn: Tensor | None  # (N, D) float32, features of the measured draws in their order; None: the model gave none
    drawn_labels: Tensor  # (N,) int64
    thumbnails: Tensor | None  # uint8 (N, THUMBNAIL, THUMBNAIL, 3), small copies of the measured draws
    agreement: Tensor | None  # (N, 3) float64, see `agreement.cosines`; None: not asked for
    problems: tuple[str, ...]  # why the model gave no pictures, if it did not

    @property
    def recipe(self) -> EvaluateRecipe:
        return self.setup.recipe

    def of(self, kind: str) -> Iterator[tuple[Task, Result]]:
        """The tasks of a kind with their results, in the order of the tasks."""
        return ((task, self.results[task.number]) for task in self.tasks if task.kind == kind)
