"""Frame choice against the authors' code, row by row."""

import numpy as np
import pytest

from mask2dit_jax.data.frames import PretrainSampling, SftSampling
from mask2dit_jax.errors import UserError
from tests.parity.cases import cases


@pytest.mark.parametrize("case", cases("sft_stride_sampling"))
def test_sft(case):
    for row in case.config["sft"]["rows"]:
        sampling = SftSampling(row["N"], row["a"], row["b"])
        if not row["feasible"]:
            with pytest.raises(UserError, match="too short"):
                sampling.choices(row["num_frames"])
            continue
        choices = sampling.choices(row["num_frames"])
        assert (choices.count, choices.stride) == (row["N"], row["max_stride"]), row
        assert list(choices.starts) == row["starts"], row
        first_last = [choices.indices(choices.starts[end]) for end in (0, -1)]
        np.testing.assert_array_equal(first_last, row["sequences_first_last"])


@pytest.mark.parametrize("case", cases("sft_stride_sampling"))
def test_pretrain(case):
    """The authors' filter wants 49 frames in any case; ours wants the requested number."""
    for row in case.config["pretrain"]["rows"]:
        sampling = PretrainSampling(row["n_frames"], row["stride"], row["drop_start"], row["drop_end"])
        assert (sampling.fitting_frames(row["num_frames"]) >= 49) == row["kept_by_dataset_filter"], row
        if row["error"]:
            with pytest.raises(UserError):
                sampling.shortened_choices(row["num_frames"])
            continue
        choices = sampling.shortened_choices(row["num_frames"])
        assert (choices.starts[0], choices.starts[-1]) == (row["start_min"], row["start_max"]), row
        for sample in row["samples"]:
            np.testing.assert_array_equal(choices.indices(sample["start"]), sample["indices"])
        if choices.count == row["n_frames"]:
            assert sampling.choices(row["num_frames"]) == choices
        else:
            with pytest.raises(UserError, match="too short"):
                sampling.choices(row["num_frames"])
