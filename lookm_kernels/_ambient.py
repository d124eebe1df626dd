"""State of torch that would change the bits of an op: autocast, and how precisely float32 is multiplied."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any

import torch

WHOLE = ("none", "ieee")
_NOTHING = nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Tensors on such a device keep their dtypes, as they do outside of torch.autocast."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


class WholeProducts:
    """float32 is multiplied as float32, not as TF32 or bfloat16, while any thread is inside.

    The setting is one of the process: a product of another thread is as precise in the meantime.
    """

    def __init__(self, matmul: Any) -> None:
        self.matmul = matmul
        self.lock = Lock()
        self.inside = 0
        self.before = "none"

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.before = self.matmul.fp32_precision
                if self.before not in WHOLE:
                    self.matmul.fp32_precision = "ieee"

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0 and self.before not in WHOLE:
                # "none" inherits from torch.backends.fp32_precision: what did so before, does so again
                self.matmul.fp32_precision = "none"
                if self.matmul.fp32_precision != self.before:
                    self.matmul.fp32_precision = self.before


_of_gpus = WholeProducts(torch.backends.cuda.matmul)
_of_others = WholeProducts(torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


def whole_products(device: torch.device) -> WholeProducts:
    """For the products of tensors on a device."""
    return _of_gpus if device.type == "cuda" else _of_others
