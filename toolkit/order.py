"""The order of the samples, which everything that reads or checks it takes from here."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def epoch_order(seed: int, epoch: int, samples: int) -> npt.NDArray[np.int64]:
    """Rows of the data set in the order of this epoch: a pure function of its arguments."""
    return np.random.default_rng([seed, epoch]).permutation(samples)
