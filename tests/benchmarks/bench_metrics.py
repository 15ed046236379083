"""Our metrics beside other programs' on the same features: `python -m tests.benchmarks.bench_metrics FOLDER`.

Features of the embedded emoji by EfficientNet-Lite0: 500 that stand for drawn pictures against 500 that stand for real ones
(one program wants equal numbers), every eighth feature, so that the covariances which the others take roots of have full
rank.  Beside torch-fidelity, clean-fid and prdc, where they are installed, stand slow versions from the papers' formulas.
Two of them want torchvision for their data sets, which is stood in for where it is missing, since nothing here uses it.
Settings: all pairs in one subset for the kernel distance; k = 3 for precision and recall, 5 for density and coverage.

Fails where one differs by more than 1e-6 relative, or where sums merged in any of 20 orders give a distance that differs by
more than 1e-9.
"""

import argparse
import contextlib
import importlib.util
import io
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
from torch import Tensor

from diffusion.evaluation.metrics.frechet import FeatureStats, Gaussian, frechet
from diffusion.evaluation.metrics.kernel import kernel_distance, mean_within
from diffusion.evaluation.metrics.manifold import Real, neighbourhood
from diffusion.threads import one_thread
from tests.benchmarks.emoji_features import emoji_features
from tests.metrics_by_hand import kernel_by_hand, neighbourhood_by_hand

TOLERANCE, MERGED = 1e-6, 1e-9
PICTURES, EVERY = 500, 8

Values = dict[str, float]
Program = Callable[[Tensor, Tensor], Values]  # of drawn and real features, (N, D) float64


def ours(drawn: Tensor, real: Tensor) -> Values:
    found = neighbourhood(drawn, Real.of(real))
    return {
        "frechet": frechet(Gaussian.of(drawn), Gaussian.of(real)),
        "kernel": kernel_distance(drawn, real, within=mean_within(real)).value,
        **{name: getattr(found, name).value for name in ("precision", "recall", "density", "coverage")},
    }


def by_hand(drawn: Tensor, real: Tensor) -> Values:
    x, y = drawn.numpy(), real.numpy()
    a, b = np.cov(x.T), np.cov(y.T)
    distance = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    return {"frechet": float(distance), "kernel": kernel_by_hand(x, y), **neighbourhood_by_hand(x, y)}


def torch_fidelity(drawn: Tensor, real: Tensor) -> Values:
    fid, kid, prc = (importlib.import_module(f"torch_fidelity.metric_{name}") for name in ("fid", "kid", "prc"))
    statistics = [fid.fid_features_to_statistics(each) for each in (drawn, real)]
    found = fid.fid_statistics_to_metric(*statistics, False)
    options = {"kid_subsets": 1, "kid_subset_size": len(drawn), "verbose": False}
    found |= kid.kid_features_to_metric(drawn, real, **options)
    found |= prc.prc_features_to_metric(drawn, real, prc_neighborhood=3, verbose=False)
    return {
        "frechet": found["frechet_inception_distance"],
        "kernel": found["kernel_inception_distance_mean"],
        "precision": found["precision"],
        "recall": found["recall"],
    }


def clean_fid(drawn: Tensor, real: Tensor) -> Values:
    fid = importlib.import_module("cleanfid.fid")
    x, y = drawn.numpy(), real.numpy()
    moments = [moment for each in (x, y) for moment in (each.mean(axis=0), np.cov(each, rowvar=False))]
    return {
        "frechet": float(fid.frechet_distance(*moments)),
        "kernel": fid.kernel_distance(y, x, num_subsets=1, max_subset_size=len(x)),
    }


def prdc(drawn: Tensor, real: Tensor) -> Values:
    compute = importlib.import_module("prdc").compute_prdc
    narrow, wide = (compute(real.numpy(), drawn.numpy(), nearest_k=k) for k in (3, 5))
    return {name: float((narrow if name in ("precision", "recall") else wide)[name]) for name in narrow}


PROGRAMS: dict[str, Program] = {
    "by hand": by_hand,
    "torch-fidelity": torch_fidelity,
    "clean-fid": clean_fid,
    "prdc": prdc,
}


_TORCHVISION = {
    "torchvision": (),
    "torchvision.datasets": ("CIFAR10", "CIFAR100", "STL10"),
    "torchvision.models": (),
    "torchvision.models.inception": ("InceptionA", "InceptionC", "InceptionE"),
    "torchvision.transforms": ("Compose",),
    "torchvision.transforms.functional": (),
}


def stand_in_for_torchvision() -> None:
    if importlib.util.find_spec("torchvision") is None:
        for name, contents in _TORCHVISION.items():
            module = sys.modules[name] = types.ModuleType(name)
            vars(module).update({each: type(each, (), {}) for each in contents})
            parent, _, own = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], own, module)


def merged_differently(drawn: Tensor, real: Tensor) -> float:
    """The largest relative difference of the distance, over orders and sizes of the parts that are merged."""
    reference, generator = Gaussian.of(real), np.random.default_rng(0)
    expected = frechet(Gaussian.of_stats(FeatureStats.of(drawn)), reference)
    worst = 0.0
    for _ in range(20):
        cuts = np.sort(generator.choice(np.arange(1, len(drawn)), 9, replace=False)).tolist()
        parts = [FeatureStats.of(part) for part in drawn.tensor_split(cuts)]
        total = FeatureStats.empty(drawn.shape[1])
        for i in generator.permutation(len(parts)):
            total = total.merge(parts[i])
        worst = max(worst, abs(frechet(Gaussian.of_stats(total), reference) / expected - 1))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="For the features")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    features = emoji_features(options.folder).features[:, ::EVERY].double()
    drawn, real = features[::3][:PICTURES], features[1::3][:PICTURES]
    failed = False
    stand_in_for_torchvision()
    with one_thread():
        own = ours(drawn, real)
        print(f"{PICTURES} against {PICTURES} pictures, {features.shape[1]} features; relative differences from ours\n")
        print(f"| | {' | '.join(own)} | seconds |\n|---|{'---|' * (len(own) + 1)}")
        print(f"| ours | {' | '.join(f'{value:.7g}' for value in own.values())} | |")
        for name, program in PROGRAMS.items():
            started = time.perf_counter()
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    found = program(drawn, real)
            except ImportError as error:
                print(f"{name} is not installed: {error}", file=sys.stderr)
                continue
            apart = {metric: abs(value / own[metric] - 1) for metric, value in found.items()}
            failed |= max(apart.values()) > TOLERANCE
            cells = [f"{apart[metric]:.1e}" if metric in apart else "" for metric in own]
            print(f"| {name} | {' | '.join(cells)} | {time.perf_counter() - started:.1f} |")
        merged = merged_differently(drawn, real)
    print(f"\nsums merged in 20 orders: {merged:.1e}")
    if failed or merged > MERGED:
        raise SystemExit(f"above {TOLERANCE:g}, or {MERGED:g} of merged sums")


if __name__ == "__main__":
    main()
