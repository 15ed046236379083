"""Whether 95 % intervals hold what they are said to in 95 % of cases: `python -m tests.benchmarks.bench_intervals FOLDER`.

The reference are the embedded emoji's features by EfficientNet-Lite0 (every so many of the 1,280, to be quicker).  The model
draws an emoji's features in the frequencies of the classes, drawn together by a tenth and shifted, plus Gaussian noise of
the features' covariance: a population of known mean and covariance without an end.  `--samples` are drawn and measured
`--repeats` times, each with its intervals.  The value that an interval should hold:

frechet, recall, coverage     the expectation at that number of samples: the mean over all repeats
frechet limit                 the distance of the population itself, by its mean and covariance
kernel, precision, density    those of sixteen times as many samples, which expect the same

Each repeat is kept in FOLDER, so that a run that was stopped goes on.  Fails where an interval holds its value in less than
90 or more than 98 % of the repeats, by more than chance would have it.
"""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor

from diffusion.evaluation.facts.distance import distances
from diffusion.evaluation.facts.neighbours import Kernel, Measured
from diffusion.evaluation.identity import SampleIdentity
from diffusion.evaluation.metrics.frechet import Gaussian, frechet
from diffusion.evaluation.metrics.intervals import CONFIDENCE
from diffusion.evaluation.metrics.kernel import kernel_distance, mean_within
from diffusion.evaluation.metrics.manifold import Real, neighbourhood
from diffusion.evaluation.metrics.sample import beside
from diffusion.evaluation.metrics.splits import allocate
from diffusion.threads import one_thread
from tests.benchmarks.emoji_features import EmojiFeatures, emoji_features
from tests.test_gate import IDENTITY

LOW, HIGH = 0.90, 0.98
FRECHET = ("frechet", "frechet limit")
NAMES = (*FRECHET, "kernel", "precision", "recall", "density", "coverage")
AT_N = ("frechet", "recall", "coverage")
DRAWN_TOGETHER, NOISE, SHIFT = 0.9, 0.3, 0.3
MORE = 16


class Model(NamedTuple):
    """The population that stands for a model, and the reference."""

    centred: Tensor  # (M, D) emoji's features less their mean, sorted by class
    starts: list[int]  # of the classes
    counts: list[int]
    shift: Tensor  # (D,) of the model's mean

    @classmethod
    def of(cls, data: EmojiFeatures, dimensions: int) -> "Model":
        features = data.features[:, :: 1280 // dimensions].double()
        counts = data.labels.bincount().tolist()
        mean = features.mean(dim=0)
        shift = SHIFT * (features[: counts[0]].mean(dim=0) - mean)
        return cls(features - mean, [sum(counts[:i]) for i in range(len(counts))], counts, shift)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Classes in the frequencies of the data, in their order, as an evaluation draws.  (N, D)."""
        chosen = [
            start + torch.randint(count, (wanted,), generator=generator)
            for start, count, wanted in zip(self.starts, self.counts, allocate(self.counts, n), strict=True)
        ]
        noise = torch.randn(n, len(self.centred), generator=generator) @ self.centred.float()
        own = DRAWN_TOGETHER * self.centred[torch.cat(chosen)]
        return self.shift + own + NOISE / math.sqrt(len(self.centred)) * noise.double()

    def labels(self, n: int) -> Tensor:
        """The classes of what `draw` gives for n, (n,) int64."""
        return torch.arange(len(self.counts)).repeat_interleave(torch.tensor(allocate(self.counts, n)))

    def population(self, n: int) -> Gaussian:
        """Mean and covariance of what `draw` gives for n."""
        wanted = allocate(self.counts, n)
        weights = torch.tensor([w / n / c for w, c in zip(wanted, self.counts, strict=True) for _ in range(c)]).double()
        mean = weights @ self.centred
        own = DRAWN_TOGETHER * weights.sqrt()[:, None] * (self.centred - mean)
        noise = NOISE / math.sqrt(len(self.centred)) * self.centred
        return Gaussian(self.shift + DRAWN_TOGETHER * mean, torch.cat([own, noise]).T)


def measured_frechet(drawn: Tensor, gaussian: Gaussian) -> dict[str, list[float]]:
    """Name -> value, low, high as the report states them."""
    found = zip(FRECHET, distances(beside(gaussian, drawn), IDENTITY), strict=True)
    return {name: [facts.value, facts.low, facts.high] for name, facts in found}


def measured_others(
    drawn: Tensor, labels: Tensor, reference: Tensor, real: Real, within: float
) -> dict[str, list[float]]:
    """Likewise."""
    identity: SampleIdentity = IDENTITY
    found = neighbourhood(drawn, real)
    kernel = Kernel.of(kernel_distance(drawn, reference, within=within, labels=labels), identity)
    rows = {"kernel": [kernel.value, kernel.low, kernel.high]}
    for name in ("precision", "recall", "density", "coverage"):
        each = getattr(found, name)
        interval = each.mean_interval if name == "density" else each.share_interval
        facts = Measured.of(each, interval(CONFIDENCE), each)
        rows[name] = [facts.value, facts.low, facts.high]
    return rows


def repeats(
    folder: Path, dimensions: int, samples: int, wanted: int, names: tuple[str, ...]
) -> tuple[list, dict[str, float]]:
    """What each repeat stated, and the values that do not depend on the number of samples."""
    model = Model.of(emoji_features(folder), dimensions)
    reference, others = model.centred, names != FRECHET
    gaussian = Gaussian.of(reference)
    truth = {"frechet limit": frechet(model.population(samples), gaussian)}
    if others:
        real, within, many = Real.of(reference), mean_within(reference), MORE * samples
        drawn, labels = model.draw(many, torch.Generator().manual_seed(2**31)), model.labels(many)
        found = neighbourhood(drawn, real)
        truth |= {"precision": found.precision.value, "density": found.density.value}
        truth["kernel"] = kernel_distance(drawn, reference, within=within, labels=labels).value
    kept = folder / f"intervals-{dimensions}-{samples}{'' if others else '-frechet'}.jsonl"
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    with kept.open("a") as file:
        for seed in range(len(done), wanted):
            drawn = model.draw(samples, torch.Generator().manual_seed(seed))
            row = measured_others(drawn, model.labels(samples), reference, real, within) if others else {}
            done.append(row | measured_frechet(drawn, gaussian))
            print(json.dumps(done[-1]), file=file, flush=True)
    return done[:wanted], truth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="For the features and what was measured")
    parser.add_argument("--dimensions", type=int, default=320, help="Of the 1,280 features, evenly spaced")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--frechet", action="store_true", help="The Frechet distance and its limit alone")
    options = parser.parse_args()
    names = FRECHET if options.frechet else NAMES
    options.folder.mkdir(parents=True, exist_ok=True)
    with one_thread():
        rows, truth = repeats(options.folder, options.dimensions, options.samples, options.repeats, names)
    n, failed = len(rows), []
    print(f"{n} repeats of {options.samples} samples, {options.dimensions} features, {CONFIDENCE:.0%} intervals\n")
    print("| metric | large-N value | mean | spread | half-width | holds it in | (95 % of chance) |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        value, low, high = np.array([row[name] for row in rows]).T
        aim = value.mean() if name in AT_N else truth[name]
        held = int(((low <= aim) & (aim <= high)).sum())
        chance = beta.ppf(0.025, held, n - held + 1), beta.ppf(0.975, held + 1, n - held) if held < n else 1.0
        if chance[1] < LOW or chance[0] > HIGH:
            failed.append(name)
        print(
            f"| {name} | {aim:.5g} | {value.mean():.5g} | {value.std(ddof=1):.3g} | {(high - low).mean() / 2:.3g} |"
            f" {held / n:.1%} | {chance[0]:.1%} to {chance[1]:.1%} |"
        )
    if failed:
        raise SystemExit(f"outside {LOW:.0%} to {HIGH:.0%}: {', '.join(failed)}")


if __name__ == "__main__":
    main()
