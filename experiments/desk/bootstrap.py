"""Intervals of a mean over training seeds and stories, both drawn anew (a crossed bootstrap)."""

import numpy as np
from jaxtyping import Float

DRAWS = 4000


def interval(values: Float[np.ndarray, "seeds stories"], confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean of `values`.

    The stories are the same for every training seed, so each draw takes some seeds and some stories, and averages what
    the one made of the other: that there are few seeds makes the interval as wide as it should be.
    """
    rng = np.random.default_rng(0)
    num_seeds, num_stories = values.shape
    # How often each was drawn; their product weighs a value.
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), DRAWS) / num_seeds
    stories = rng.multinomial(num_stories, np.full(num_stories, 1 / num_stories), DRAWS) / num_stories
    means = np.einsum("ds,st,dt->d", seeds, values, stories, optimize=True)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
