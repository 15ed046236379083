"""Quantiles of intervals against an independent implementation.  Standard errors are tested beside what they are of."""

import pytest
import scipy.stats

from diffusion.evaluation.metrics.intervals import t_quantile


@pytest.mark.parametrize("probability", [0.75, 0.95, 0.975, 0.99])
@pytest.mark.parametrize("degrees", [8, 15, 31])
def test_t_quantile(probability, degrees):
    assert t_quantile(probability, degrees) == pytest.approx(scipy.stats.t.ppf(probability, degrees), rel=2e-3)
