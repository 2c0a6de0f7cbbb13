"""The rules themselves are in tests/parity; here is what is drawn from them."""

import numpy as np
import pytest

from mask2dit_jax.data.frames import PretrainSampling, SftSampling, TooShort


@pytest.mark.parametrize("sampling", [SftSampling(9, 1, 3), PretrainSampling(9, 3)])
def test_draws_every_start_and_no_other(sampling):
    choices = sampling.choices(38)
    drawn = {choices.draw(np.random.default_rng(seed)) for seed in range(300)}
    assert drawn == set(choices.starts)
    last = choices.indices(choices.starts[-1])
    assert last[-1] < 38
    assert (np.diff(last) == choices.stride).all()


def test_one_choice_only():
    choices = SftSampling(9, 1, 1).choices(9)
    assert choices.draw(np.random.default_rng(0)) == 0


@pytest.mark.parametrize(
    ("sampling", "too_short"), [(SftSampling(9, 2, 3), 16), (PretrainSampling(9, 3), 30), (PretrainSampling(9, 3), 1)]
)
def test_too_short(sampling, too_short):
    with pytest.raises(TooShort, match=rf"a clip of {too_short} frames is too short"):
        sampling.choices(too_short)
    assert sampling.choices(31).count == 9
