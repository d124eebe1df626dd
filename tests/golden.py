"""What the authors' own classes made of one layer (tests/data/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parent / "data"
CASES: list[dict[str, Any]] = json.loads((DATA / "upstream_a.json").read_text())["cases"]


def load(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors by name: q, k, v, image_mask, score, and those of the cases."""
    return {name: tensor.to(device) for name, tensor in load_file(DATA / "upstream_a.safetensors").items()}


def differences(layer: dict[str, Tensor], case: dict[str, Any], key: Tensor, value: Tensor) -> list[Tensor]:
    """Compressed keys [1, H, K, D] and values minus the authors', in the columns that are recorded of either.

    snapkv: theirs are in the order of their scores; equal sets of rows have equal first numbers of the keys.
    """
    ours, name = [key[..., ::4], value], case["name"]
    if f"{name}.kept" in layer:
        place = layer[f"{name}.kept"].long()[..., None]
        theirs = [layer["k"][..., ::4].take_along_dim(place, 2), layer["v"].take_along_dim(place, 2)]
    else:
        theirs = [layer[f"{name}.k"], layer[f"{name}.v"]]
    if case["mode"] == "snapkv":
        for pair in (ours, theirs):
            order = pair[0][..., :1].argsort(dim=2)
            pair[:] = [tensor.take_along_dim(order, 2) for tensor in pair]
    return [our - their for our, their in zip(ours, theirs, strict=True)]
