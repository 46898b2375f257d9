"""Makes `jobs/corpus/digits.npz` from the digits that scikit-learn ships.

    python tools/make_corpus.py

A tool of its own, so that the package itself needs no scikit-learn. The file holds `images_NHW` (uint8
[1797, 8, 8], 0 to 16), `labels` (uint8 [1797]) and `held_out` (bool [1797]).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from jobs.corpus import DATA

HELD_OUT_FRACTION = 0.2
SPLIT_SEED = 0


def held_out_flags(labels_N: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """True for a random fifth in which every label has its share."""
    positions_N = np.arange(len(labels_N))
    _, held_out_positions = train_test_split(
        positions_N, test_size=HELD_OUT_FRACTION, stratify=labels_N, random_state=SPLIT_SEED
    )
    return np.isin(positions_N, held_out_positions)


def main() -> None:
    source = load_digits()
    labels_N = source.target.astype(np.uint8)
    np.savez_compressed(
        DATA, images_NHW=source.images.astype(np.uint8), labels=labels_N, held_out=held_out_flags(labels_N)
    )
    print(f"{DATA}: {len(labels_N):,} digits, {DATA.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
