"""The ops against the outputs of the authors' own classes (tests/data/README.md)."""

from __future__ import annotations

from typing import NamedTuple

import golden
import pytest
import torch
from golden import CASES
from torch import Tensor
from torch.nn.functional import avg_pool1d

import lookm_kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Mode(NamedTuple):
    """What one of the authors' modes is in the terms of the ops."""

    rule: str
    gate: str | None = None
    text_prior: bool = False
    sinks: int = 0


MODES = {
    "h2o": Mode("none"),
    "snapkv": Mode("none"),
    "pivot_merge": Mode("pivotal", sinks=4),
    "weighted_merge": Mode("weighted", gate="mean_similarity", sinks=4),
    "text_prior_h2o": Mode("none", text_prior=True),
    "text_prior_pivot_merge": Mode("pivotal", text_prior=True),
    "text_prior_weighted_merge": Mode("weighted", gate="mean_similarity", text_prior=True),
}


@pytest.fixture(scope="module")
def layer(device: torch.device) -> dict[str, Tensor]:
    return golden.load(device)


def budget(case: dict[str, float], mode: Mode, image: Tensor) -> tuple[Tensor, int]:
    """tier [1, N] and the number of kept tokens; with a text prior the authors never evict text."""
    tokens = image.shape[0]
    important, recent = int(case["important_ratio"] * tokens), int(case["recent_ratio"] * tokens)
    tier = torch.ones(1, tokens, dtype=torch.int32, device=image.device)
    if mode.text_prior:
        tier[0, ~image] = 2
        important = max(important, int((~image[: tokens - recent]).sum()))
    tier[0, : mode.sinks] = 3
    tier[0, tokens - recent :] = 3
    return tier, important + recent


def window_scores(layer: dict[str, Tensor], window: int) -> Tensor:
    """SnapKV: column sums of the last queries, none for the window itself, smoothed by a moving mean of 5."""
    scores = lookm_kernels.attention_scores(layer["q"][:, :, -window:], layer["k"])
    scores[..., -window:] = 0
    return avg_pool1d(scores, 5, stride=1, padding=2)


def test_scores_are_the_authors(layer: dict[str, Tensor]) -> None:
    scores = lookm_kernels.attention_scores(layer["q"], layer["k"])
    torch.testing.assert_close(scores[0], layer["score"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_compressed_cache_is_the_authors(layer: dict[str, Tensor], case: dict) -> None:
    mode = MODES[case["mode"]]
    tier, keep = budget(case, mode, layer["image_mask"])
    assert keep == case["kept"]
    if case["mode"] == "snapkv":
        scores = window_scores(layer, int(case["recent_ratio"] * tier.shape[1]))
    else:
        scores = lookm_kernels.attention_scores(layer["q"], layer["k"])
    key, value = layer["k"].clone(), layer["v"].clone()
    lookm_kernels.compress_(key, value, scores, tier, keep, mode.rule, mode.gate)
    for difference in golden.differences(layer, case, key[:, :, :keep], value[:, :, :keep]):
        assert difference.abs().max() <= 1e-5


def test_every_mode_has_a_case() -> None:
    assert {case["mode"] for case in CASES} == set(MODES)
