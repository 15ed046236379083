"""Kernel distance, precision, recall, density and coverage once more, slowly and from the papers' formulas, with numpy and
scipy alone: for the tests, and for the benchmark that compares ours with other programs."""

import numpy as np
from scipy.spatial.distance import cdist


def kernel_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased MMD^2 with k = (x . y / D + 1)^3, pair by pair.  [Gretton 2012, Eq. 3]"""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (float(np.dot(a, b)) / x.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    across = sum(k(a, b) for a in x for b in y) / (n * m)
    return within_x + within_y - 2 * across


def neighbourhood_by_hand(drawn: np.ndarray, real: np.ndarray, *, narrow: int = 3, wide: int = 5) -> dict[str, float]:
    """narrow: k of precision and recall.  wide: k of density and coverage."""

    def radii(x: np.ndarray, k: int) -> np.ndarray:
        return np.sort(cdist(x, x), axis=1)[:, k]  # the nearest of all is the picture itself

    apart = cdist(real, drawn)  # (M, N)
    within = apart <= radii(real, wide)[:, None]
    return {
        "precision": float((apart <= radii(real, narrow)[:, None]).any(axis=0).mean()),
        "recall": float((apart <= radii(drawn, narrow)[None, :]).any(axis=1).mean()),
        "density": float(within.sum(axis=0).mean() / wide),
        "coverage": float(within.any(axis=1).mean()),
    }
