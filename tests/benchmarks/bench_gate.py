"""What the gate lets pass: `python -m tests.benchmarks.bench_gate`; `--out` for another folder, from which it goes on.

In each round the embedded emoji are divided anew into training pictures, held-out ones and a rest that stands for what
models draw: a model is a distribution over real pictures, of which a share is blurred, and it draws independent samples of
it.  A champion and a challenger of each kind are measured in EfficientNet-Lite0 features (`--dimensions` principal
components of them) by the real metrics, reports and gate, with the default recipe:

    noise      the champion's own distribution, other samples: the alias moves by mistake
    slightly   half as many blurred pictures as the champion; `slightly, alike`: and the same pictures otherwise, as of two
               models that drew from the same noise; `unblurred`: none blurred
    worse      half as many more, alike
    memorizes  none blurred, but a tenth are copies of training pictures
    drops      none blurred, but classes of more than a fifth of all pictures are never drawn

The stated rate of noise is (1 - gate.confidence) / 2.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.data.images import decode
from diffusion.data.sources import open_source, read_item
from diffusion.evaluation.extractors.features import extractor
from diffusion.evaluation.facts.distance import Frechet
from diffusion.evaluation.facts.held_out import HeldOutLoss
from diffusion.evaluation.facts.memorized import Memorization, MemorizationIdentity
from diffusion.evaluation.facts.neighbours import Measured, Neighbours
from diffusion.evaluation.gate.gate import verdict
from diffusion.evaluation.identity import SampleIdentity
from diffusion.evaluation.metrics.frechet import Gaussian
from diffusion.evaluation.metrics.intervals import CONFIDENCE
from diffusion.evaluation.metrics.manifold import Estimate, Real, neighbourhood
from diffusion.evaluation.metrics.memorization import Copies, Looks, Nearest, copies, nearest, shrink
from diffusion.evaluation.metrics.sample import frechet_to
from diffusion.evaluation.metrics.shares import betainc
from diffusion.evaluation.metrics.splits import allocate
from diffusion.evaluation.report.report import Environment, Report
from diffusion.recipe import GateRecipe, SamplingRecipe, digest_of
from diffusion.threads import one_thread

SIDE, RESOLUTION = 32, 64  # of the pictures; of the extractor
TRAINING, HELD_OUT = 700, 200
BLURRED = 0.3  # of the champion's pictures


class Kind(NamedTuple):
    """What a model draws."""

    blurred: float = 0.0  # share of its pictures
    copied: float = 0.0
    dropped: float = 0.0  # share of all pictures whose classes it never draws, at least
    alike: bool = False  # it draws what the champion draws, but for that


CHALLENGERS = {
    "noise": Kind(BLURRED),
    "slightly": Kind(BLURRED / 2),
    "slightly, alike": Kind(BLURRED / 2, alike=True),
    "unblurred, alike": Kind(alike=True),
    "worse, alike": Kind(BLURRED * 1.5, alike=True),
    "memorizes": Kind(copied=0.1),
    "drops": Kind(dropped=0.2),
}


class Pictures(NamedTuple):
    """All pictures as they are, then all blurred; labels of the former."""

    features: Tensor  # (2 N, D)
    small: Tensor  # uint8 (2 N, side, side, 3)
    labels: np.ndarray  # (N,)


class Round(NamedTuple):
    """One division of the pictures, and what of it is the same for all models."""

    number: int
    pictures: Pictures
    training: np.ndarray
    rest: np.ndarray
    reference: Gaussian
    real: Real
    looks: Looks  # of the training pictures
    control: Nearest


def load(folder: Path, dimensions: int) -> Pictures:
    """The embedded pictures and their features, which are kept in the folder."""
    kept = folder / f"features-{RESOLUTION}.pt"
    if not kept.exists():
        source = open_source("embedded")
        items = list(source.items())
        data = [read_item(source.uri, item.place) for item in items]
        clean = torch.from_numpy(np.stack([decode(each, resolution=SIDE, background="#ffffff") for each in data]))
        both = torch.cat([clean, _blurred(clean)])
        features = extractor("efficientnet-lite0", resolution=RESOLUTION)(both)
        names = sorted({item.label for item in items})
        labels = torch.tensor([names.index(item.label) for item in items])
        torch.save((features, shrink(both), labels), kept)
    features, small, labels = torch.load(kept, weights_only=True)
    mean = features.double().mean(dim=0)
    _, _, axes = torch.linalg.svd(features[: len(labels)].double() - mean, full_matrices=False)
    return Pictures((features.double() - mean) @ axes[:dimensions].T, small, labels.numpy())


def _blurred(pictures: Tensor) -> Tensor:
    """uint8 (N, H, W, 3), of half the resolution."""
    half = F.interpolate(pictures.permute(0, 3, 1, 2).float(), scale_factor=0.5, mode="area")
    back = F.interpolate(half, scale_factor=2, mode="bilinear")
    return back.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def divided(pictures: Pictures, number: int) -> Round:
    order = np.random.default_rng([number, 0]).permutation(len(pictures.labels))
    training, held_out, rest = np.split(order, [TRAINING, TRAINING + HELD_OUT])
    own, looks = pictures.features[training], Looks(pictures.features[training], pictures.small[training])
    control = nearest(Looks(pictures.features[held_out], pictures.small[held_out]), looks)
    return Round(number, pictures, training, rest, Gaussian.of(own), Real.of(own), looks, control)


def drawn(at: Round, samples: int, kind: Kind, seed: int) -> np.ndarray:
    """Rows of the pictures that a model of this kind draws, by class as an evaluation draws them."""
    random = np.random.default_rng([at.number, 1 + (0 if kind.alike else seed)])
    labels = at.pictures.labels
    counts = np.bincount(labels[at.training], minlength=labels.max() + 1)
    if kind.dropped:  # the classes in a random order, until their share is reached
        for label in random.permutation(len(counts)):
            if counts.sum() < (1 - kind.dropped) * TRAINING:
                break
            counts[label] = 0
    rows = []
    for label, n in enumerate(allocate(counts.tolist(), samples)):
        members, own = (set_[labels[set_] == label] for set_ in (at.rest, at.training))
        found = random.choice(members if len(members) else at.rest, n)
        found = found + len(labels) * (random.random(n) < kind.blurred)
        copy = random.random(n) < kind.copied
        rows.append(np.where(copy, random.choice(own if len(own) else at.training, n), found))
    return np.concatenate(rows)


def measured(at: Round, rows: np.ndarray, model: str, dimensions: int) -> Report:
    """The report on these pictures, of what the gate reads."""
    features = at.pictures.features[rows]
    distance = frechet_to(at.reference, features)
    found = neighbourhood(features, at.real)
    copied = copies(
        nearest(Looks(features, at.pictures.small[rows]), at.looks), at.control, training=len(at.looks.features)
    )
    identity = _identity(at, len(rows), dimensions)
    return Report(
        bundle_digest=digest_of({"model": model, "round": at.number}),
        run_digest="1" * 64,
        recipe_digest="2" * 64,
        dataset_digest=identity.dataset_digest,
        classes=("emoji",),
        images_seen=1,
        ema=0.1,
        frechet=Frechet.of(distance, identity.model_copy(update={"metric": "frechet/1"})),
        floor=None,
        neighbours=_neighbours(found, identity),
        memorization=_memorization(copied, identity),
        held_out=(HeldOutLoss(sigma=1.0, loss=0.5, standard_error=0.01, zero=1.0, pictures=HELD_OUT),),
        seed=0,
        problems=(),
        environment=Environment(torch=torch.__version__, device="cpu"),
    )


def _identity(at: Round, samples: int, dimensions: int) -> SampleIdentity:
    return SampleIdentity(
        metric="neighbours/1",
        dataset_digest=digest_of({"round": at.number}),
        reference_pictures=TRAINING,
        extractor={"name": "efficientnet-lite0", "digest": "9" * 64, "resolution": RESOLUTION},
        dimensions=dimensions,
        samples=samples,
        sampling=SamplingRecipe(),
        batch_size=1,
        seed=0,
    )


def _neighbours(found, identity: SampleIdentity) -> Neighbours:
    def of(estimate: Estimate, interval: tuple[float, float]) -> Measured:
        return Measured.of(estimate, interval, estimate)

    shares = {
        name: of(each, each.share_interval(CONFIDENCE))
        for name, each in (("precision", found.precision), ("recall", found.recall), ("coverage", found.coverage))
    }
    density = of(found.density, found.density.mean_interval(CONFIDENCE))
    sizes = {"real_pictures": TRAINING, "real_against": TRAINING}
    return Neighbours(identity=identity, confidence=CONFIDENCE, density=density, **shares, **sizes)


def _memorization(found: Copies, identity: SampleIdentity) -> Memorization:
    sample = identity.model_copy(update={"metric": "memorization/1"})
    counted = MemorizationIdentity(sample=sample, held_out_pictures=HELD_OUT)
    values = {
        name: getattr(found, name) for name in ("share", "confidence", "low", "high", "near", "counted", "threshold")
    }
    return Memorization(identity=counted, expected=0.0, pairs=(), **values)


def reports(at: Round, file: Path, samples: int, dimensions: int) -> dict[str, Report]:
    """Of the champion and of each challenger; those that the file has are not measured again."""
    done = {}
    if file.exists():
        done = {name: Report.model_validate(value) for name, value in json.loads(file.read_text()).items()}
    kinds = {"champion": Kind(BLURRED), **CHALLENGERS}
    if done.keys() >= kinds.keys():
        return done
    for seed, (name, kind) in enumerate(kinds.items()):
        done[name] = measured(at, drawn(at, samples, kind, seed), name, dimensions)
    partly = file.with_suffix(".part")
    partly.write_text(json.dumps({name: report.model_dump(mode="json") for name, report in done.items()}))
    partly.rename(file)
    return done


def interval(k: int, n: int) -> str:
    """95 % of a rate of k in n, exact [Clopper & Pearson 1934], in percent."""
    grid = np.linspace(0, 1, 20_001)
    low = grid[betainc(k, n - k + 1, grid) >= 0.025][0] if k else 0.0
    high = grid[betainc(k + 1, n - k, grid) <= 0.975][-1] if k < n else 1.0
    return f"{100 * low:.1f} to {100 * high:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".diffusion/bench-gate"))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--dimensions", type=int, default=128)
    given = parser.parse_args()
    folder = given.out / f"{given.samples}-{given.dimensions}"
    folder.mkdir(parents=True, exist_ok=True)
    gate = GateRecipe()
    moved, refused, gains = Counter(), Counter(), {name: [] for name in CHALLENGERS}
    with one_thread():
        pictures = load(given.out, given.dimensions)
        for number in range(given.rounds):
            found = reports(divided(pictures, number), folder / f"{number:04d}.json", given.samples, given.dimensions)
            for name in CHALLENGERS:
                judged = verdict(found[name], found["champion"], gate)
                moved[name] += judged.passed
                refused.update((name, check.name) for check in judged.checks if not check.passed)
                gains[name].append(1 - found[name].frechet.value / found["champion"].frechet.value)
            if number % 20 == 19:
                print(f"{number + 1} rounds: {dict(moved)}", flush=True)
    kinds = ("frechet", "coverage", "recall", "memorization")
    print(f"\n| challenger | distance lower by | moved, of {given.rounds} | 95 % | refused for {', '.join(kinds)} |")
    print("|---|---|---|---|---|")
    for name in CHALLENGERS:
        n, why = moved[name], ", ".join(str(refused[name, kind]) for kind in kinds)
        print(
            f"| {name} | {np.mean(gains[name]):.1%} | {n}: {n / given.rounds:.1%} | {interval(n, given.rounds)} % | {why} |"
        )
    print(f"stated for noise: {(1 - gate.confidence) / 2:.1%}")


if __name__ == "__main__":
    main()
