"""Whether a sweep chooses what it says, and what dropping settings early saves, over many sweeps with a known truth.

    python -m tests.benchmarks.bench_sweep [--rounds 200] [--dimensions 192]

Settings stand for Gaussians of features: the reference's, whose variances fall as a power law as those of pictures do, with
some contrast lost (as guidance and few steps do) and a shift.  All draw from the same seeds, and a part of their own.
Truth is a setting's mean distance at as many samples over all sweeps, in which nothing is dropped.
"""

import argparse
import math

import torch

from diffusion.evaluation.metrics.frechet import Gaussian
from diffusion.evaluation.metrics.sample import Distance, frechet_to
from diffusion.evaluation.sweep.choice import Candidate, beaten, choice, rounds
from diffusion.recipe import SweepRecipe

SWEEP = SweepRecipe(steps=(6, 8, 12, 24), guidance=(1.5, 2.5), samples=512, first_samples=128)
SETTINGS = tuple(  # evaluations, contrast, shift as a share of the spread
    (evaluations, contrast, shift)
    for evaluations, shift in ((12, 0.30), (16, 0.20), (24, 0.162), (48, 0.160))
    for contrast in (0.96, 0.93, 0.88, 0.80)
)
OWN = 0.5  # of a setting's features, against what it shares with the others


def distance(reference: Gaussian, setting: int, seed: int, n: int) -> Distance:
    """Of n samples of a setting in the sweep of this seed; more samples only add some."""
    _, contrast, shift = SETTINGS[setting]
    scale = reference.root.diagonal()
    # a row for a sample, so that the first rows are those of a smaller round
    shared = torch.randn(SWEEP.samples, len(scale), generator=torch.Generator().manual_seed(seed)).double()
    apart = torch.randn(
        SWEEP.samples, len(scale), generator=torch.Generator().manual_seed(10**6 * (setting + 1) + seed)
    ).double()
    features = contrast * (shared + OWN * apart) / math.sqrt(1 + OWN**2) + shift
    return frechet_to(reference, (features * scale)[:n])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="sweeps")
    parser.add_argument("--dimensions", type=int, default=192, help="of the features: more than the first samples")
    given = parser.parse_args()
    torch.set_num_threads(1)
    scale = torch.arange(1, given.dimensions + 1).double() ** -0.5
    reference = Gaussian(torch.zeros(given.dimensions).double(), scale.diag())
    values, outcomes, evaluations = [], [], 0
    for seed in range(given.rounds):
        alive, all_of_them = set(range(len(SETTINGS))), []
        gone: dict[int, int] = {}
        for n in rounds(SWEEP):
            measured = range(len(SETTINGS)) if n == SWEEP.samples else sorted(alive)  # the last round tells the truth
            found = [Candidate(i, SETTINGS[i][0], distance(reference, i, seed, n)) for i in measured]
            all_of_them.append(found)
            if len(alive) > 1:
                gone |= (lost := beaten([one for one in found if one.number in alive], SWEEP.confidence))
                evaluations += sum(SETTINGS[i][0] * (n if n == rounds(SWEEP)[0] else n - n // 2) for i in alive)
                alive -= lost.keys()
        left = [one for one in all_of_them[-1] if one.number in alive]
        outcomes.append((gone, *choice(left, SWEEP.tolerance, SWEEP.confidence)[1:]))
        values.append([one.distance.value for one in all_of_them[-1]])
    truth = [math.fsum(column) / len(values) for column in zip(*values, strict=True)]
    best = min(truth)
    fit = [value <= (1 + SWEEP.tolerance) * best for value in truth]
    fastest = min(SETTINGS[i][0] for i in range(len(SETTINGS)) if fit[i])
    whole = given.rounds * SWEEP.samples * sum(cost for cost, _, _ in SETTINGS)
    print("setting  evaluations  true distance  above the lowest  chosen in")
    for i, value in enumerate(truth):
        times = sum(chosen == i for _, chosen, _ in outcomes)
        print(f"{i:7}  {SETTINGS[i][0]:11}  {value:13.4g}  {value / best - 1:16.1%}  {times / given.rounds:9.1%}")
    sure = [chosen for _, chosen, certain in outcomes if certain]
    wrong = sum(not fit[chosen] for chosen in sure)
    lost = sum(truth.index(best) in gone for gone, _, _ in outcomes)
    found = sum(fit[chosen] and SETTINGS[chosen][0] == fastest for chosen in sure)
    print(
        f"certain: {len(sure)} of {given.rounds}, of which above the lowest by more than {SWEEP.tolerance:.0%}: {wrong}"
    )
    print(f"and of which the fastest of those within {SWEEP.tolerance:.0%}: {found}")
    print(f"best one dropped: {lost} of {given.rounds} (stated: at most 2.5 %)")
    print(f"evaluations against drawing all samples of all settings: {evaluations / whole:.0%}")


if __name__ == "__main__":
    main()
