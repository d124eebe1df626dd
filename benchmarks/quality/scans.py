"""The scanned digits of scikit-learn, split once and for all into a part for training and a part held out.

python benchmarks/quality/scans.py     writes the held-out part to python/lookm/demo/digits.npz
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lookm.demo.task import Scans

HELD_OUT_FILE = Path(__file__).parents[2] / "python" / "lookm" / "demo" / "digits.npz"
SPLIT_SEED = 0

Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]


def split() -> tuple[Arrays, Arrays]:
    """(training, held out), each (images uint8 [n, 8, 8] in 0..16, labels uint8 [n]): a quarter of each class."""
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=SPLIT_SEED)
    return (parts[0], parts[2]), (parts[1], parts[3])


def training_scans() -> Scans:
    return Scans.from_arrays(*split()[0])


if __name__ == "__main__":
    images, labels = split()[1]
    np.savez_compressed(HELD_OUT_FILE, images=images, labels=labels)
    print(f"{len(labels)} scans, {HELD_OUT_FILE.stat().st_size} bytes: {HELD_OUT_FILE}")
