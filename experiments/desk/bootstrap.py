"""Confidence intervals of a mean over training seeds and stories, by a crossed bootstrap that resamples both."""

import numpy as np
from jaxtyping import Float

DRAWS = 4000


def interval(values: Float[np.ndarray, "seeds stories"], confidence: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of the mean of `values`.

    The stories are the same for all training seeds. Each draw therefore resamples seeds and stories and averages over
    their combinations, so that a small number of seeds widens the interval as it should.
    """
    rng = np.random.default_rng(0)
    num_seeds, num_stories = values.shape
    # How often each seed and story was drawn. Their product is the weight of a value.
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), DRAWS) / num_seeds
    stories = rng.multinomial(num_stories, np.full(num_stories, 1 / num_stories), DRAWS) / num_stories
    means = np.einsum("ds,st,dt->d", seeds, values, stories, optimize=True)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
