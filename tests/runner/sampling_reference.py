"""What the filters leave of a row of logits, in plain float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


def reference_distribution(
    logits: npt.NDArray[np.float32], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float64:
    """Probabilities [vocab_size] after the filters, by the words of `miniserve.kernels.sampling`."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    kept = np.argsort(-logits, kind="stable")
    kept = kept[weights[kept] >= min_p]
    kept = kept[: top_k or None]
    if top_p < 1.0:
        mass = weights[kept].cumsum()
        first_equal = np.searchsorted(-weights[kept], -weights[kept])
        ahead = np.append(0.0, mass)[first_equal]
        kept = kept[ahead < top_p * mass[-1]]
    result = np.zeros(len(weights))
    result[kept] = weights[kept]
    return result / result.sum()


def check_inverse_cdf(token: int, number: float, distribution: Float64) -> None:
    """The token is the one that the number in [0, 1) points at, in the order of the ids, but for float32's rounding."""
    mass = distribution.cumsum()
    assert distribution[token] > 0
    assert mass[token] - distribution[token] - 1e-6 <= number <= mass[token] + 1e-6


def check_counts(counts: npt.NDArray[np.int64], distribution: Float64) -> None:
    """A chi-square test of how often each token was drawn, the rare ones pooled; five standard deviations."""
    num_draws = counts.sum()
    assert not counts[distribution == 0].any()
    common = distribution * num_draws >= 5
    pools = [(counts[common], distribution[common] * num_draws)]
    if distribution[~common].sum() * num_draws >= 5:
        rare = distribution[~common].sum(keepdims=True) * num_draws
        pools.append((counts[~common].sum(keepdims=True), rare))
    statistic = sum(((seen - wanted) ** 2 / wanted).sum() for seen, wanted in pools)
    freedom = max(sum(len(seen) for seen, _ in pools) - 1, 1)
    assert statistic < freedom + 5 * np.sqrt(2 * freedom) + 5
