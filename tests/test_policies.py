"""Policies: the registry, their options, and each one against the authors' outputs or plain loops."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import golden
import pytest
import torch
from golden import CASES
from torch import Tensor

pytest.importorskip("transformers")

from families import FAMILIES, HEAD_DIM, IMAGE, image_mask
from loops import column_sums, visible

import lookm
from lookm import POLICIES, Attention, LookMCache, Pairs, Policy, Prompt, register_policy
from lookm.budget import parse_budget
from lookm.forward import Forward
from lookm.layer import LookMLayer
from lookm.plan import Settings, pick_queries
from lookm.policy import ALIASES, DESCRIPTIONS
from lookm.store.growing import Growing

PLAIN = {
    "recent_share": 0.5, "sinks": 0, "text_prior": False, "rule": "none", "gate": None, "protect_text": False,
    "queries": "all", "stride": 8, "phase": 0, "fp8": False, "votes": False, "similarity": "key", "group": None,
    "min_similarity": None, "refine": 0, "floor": 0, "grid": 0.0, "visit_power": 0.0,
}  # fmt: skip
SNAPKV = {"window": None, "kernel_size": 5, "pooling": "average"}
DEFAULTS = {
    "full": {},
    "h2o": {},
    "mean_h2o": {"visit_power": 1.0},
    "snapkv": SNAPKV,
    "streaming": {"sinks": 4, "recent_share": 1.0},
    "avg_merge": {"rule": "average", "sinks": 4},
    "weighted_merge": {"rule": "weighted", "sinks": 4},
    "pivot_merge": {"rule": "pivotal", "sinks": 4},
    "text_prior_h2o": {"text_prior": True},
    "text_prior_avg_merge": {"text_prior": True, "rule": "average"},
    "text_prior_weighted_merge": {"text_prior": True, "rule": "weighted"},
    "text_prior_pivot_merge": {"text_prior": True, "rule": "pivotal"},
    "auto": {
        "text_prior": True, "rule": "average", "votes": True, "similarity": "key_value", "group": "medium",
        "min_similarity": 0.8, "refine": 1, "floor": 2, "recent_share": 0.2, "visit_power": 0.25, "spread": 0.15,
    },
    "madakv": {"recent_share": 0.1, "window": 32, "cover": 0.9},
    "mixkv": {"text_prior": True},
    "vlcache": {"recent_share": 0.1, "window": 64, "threshold": 0.01},
    "prefixkv": {"profile": None},
    "flowmm": {"text_prior": True, "rule": "pivotal", "group": "medium", "crossing": 0.25},
}  # fmt: skip
BAD_OPTIONS = [
    ("lookm", {"recent_share": 1.5}),
    ("lookm", {"recent_share": "half"}),
    ("lookm", {"recent_share": float("nan")}),
    ("lookm", {"sinks": -1}),
    ("lookm", {"sinks": 2.5}),
    ("lookm", {"sinks": True}),
    ("lookm", {"rule": "median"}),
    ("lookm", {"rule": ["none"]}),
    ("lookm", {"gate": "max"}),
    ("lookm", {"text_prior": "no"}),
    ("lookm", {"protect_text": "yes"}),
    ("h2o", {"protect_text": True}),
    ("lookm", {"queries": "images"}),
    ("lookm", {"queries": None}),
    ("lookm", {"stride": 0}),
    ("lookm", {"votes": 1}),
    ("lookm", {"similarity": "value"}),
    ("lookm", {"group": "text"}),
    ("lookm", {"min_similarity": 2}),
    ("lookm", {"refine": -1}),
    ("lookm", {"floor": 0.5}),
    ("lookm", {"grid": 1.5}),
    ("lookm", {"visit_power": -1}),
    ("auto", {"spread": 2.0}),
    ("prefixkv", {"profile": [1.0, 2.0]}),
    ("prefixkv", {"profile": (1.0, 0.0)}),
    ("lookm", {"stride": 2.0}),
    ("lookm", {"stride": True}),
    ("lookm", {"phase": -1}),
    ("lookm", {"phase": 8}),
    ("snapkv", {"phase": 4, "stride": 4}),
    ("lookm", {"fp8": 1}),
    ("snapkv", {"window": 0}),
    ("snapkv", {"window": 2.5}),
    ("snapkv", {"window": "5"}),
    ("snapkv", {"kernel_size": 4}),
    ("snapkv", {"kernel_size": 3.0}),
    ("snapkv", {"pooling": "median"}),
]
LLAVA = FAMILIES["llava"]
LAYOUT = (7, IMAGE, 9, IMAGE, 5)


def prefill(layout=LAYOUT, **options) -> tuple[LookMCache, Tensor]:
    """The cache after one prompt, and which of its tokens are images [N]."""
    model, inputs = LLAVA.model(), LLAVA.inputs([LLAVA.prompt(layout)])
    cache = LookMCache(model, **options)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    return cache, image_mask(inputs["input_ids"])[0]


def test_the_registry():
    assert {name: asdict(policy) for name, policy in POLICIES.items()} == {
        name: PLAIN | changes for name, changes in DEFAULTS.items()
    }
    assert ALIASES == {"lookm": "text_prior_pivot_merge"}
    assert all(DESCRIPTIONS[name] for name in POLICIES)


def test_lookm_is_the_default():
    model = LLAVA.model()
    policies = [LookMCache(model, **named).layers[0].settings.policy for named in ({}, {"policy": "lookm"})]
    assert policies == [POLICIES["text_prior_pivot_merge"]] * 2


@pytest.mark.parametrize(("policy", "options"), BAD_OPTIONS, ids=str)
def test_bad_option_values(policy: str, options: dict):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be "):
        LookMCache(LLAVA.model(), policy=policy, **options)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"must be one of lookm, full, .*; got 'look-m': did you mean 'lookm'\?"):
        LookMCache(LLAVA.model(), policy="look-m")
    with pytest.raises(ValueError, match=r"got 'Text_prior_h20': did you mean 'text_prior_h2o'\?"):
        LookMCache(LLAVA.model(), policy="Text_prior_h20")
    with pytest.raises(ValueError, match=r"got 'best'$"):
        LookMCache(LLAVA.model(), policy="best")
    with pytest.raises(ValueError, match=r"got 'recentshare': did you mean 'recent_share'\?"):
        LookMCache(LLAVA.model(), policy="h2o", recentshare=0.1)
    with pytest.raises(ValueError, match=r"options of this policy are recent_share, .*; got 'window'"):
        LookMCache(LLAVA.model(), policy="h2o", window=5)
    with pytest.raises(TypeError, match=r"`policy` must be a name or a lookm\.Policy, got int"):
        LookMCache(LLAVA.model(), policy=5)


def test_a_policy_of_ones_own():
    @register_policy("first_come", recent_share=0.0)
    @dataclass(frozen=True)
    class FirstCome(Policy):
        """Earlier tokens first."""

        def score(self, attention: Attention) -> Tensor:
            batch, heads = attention.key.shape[:2]
            return -torch.arange(attention.prompt.image.shape[1]).float().expand(batch, heads, -1)

    try:
        assert DESCRIPTIONS["first_come"] == "Earlier tokens first."
        for policy in ("first_come", FirstCome(recent_share=0.0)):
            cache, _ = prefill(budget=10, policy=policy)
            assert (cache.kept_positions(1) == torch.arange(10)).all()
    finally:
        del POLICIES["first_come"], DESCRIPTIONS["first_come"]
    with pytest.raises(ValueError, match="first_come"):
        LookMCache(LLAVA.model(), policy="first_come")


def test_a_name_is_registered_again_as_by_a_notebooks_cell():
    def cell(sinks: int) -> type[Policy]:
        @register_policy("mine", sinks=sinks)
        @dataclass(frozen=True)
        class Mine(Policy):
            """My own."""

        return Mine

    try:
        first, second = cell(1), cell(2)
        assert first is not second
        assert type(POLICIES["mine"]) is second
        assert LookMCache(LLAVA.model(), policy="mine").layers[0].settings.policy.sinks == 2
        for name in ("lookm", "h2o", "text_prior_pivot_merge"):
            before = dict(POLICIES)
            with pytest.raises(ValueError, match=f"`name` must not be that of a policy of the package, got '{name}'"):
                register_policy(name)(second)
            assert before == POLICIES
    finally:
        del POLICIES["mine"], DESCRIPTIONS["mine"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_layers_hold_what_the_authors_classes_hold(case: dict):
    data = golden.load()
    options: dict = {"protect_text": True} if case["mode"].startswith("text_prior") else {}
    if "weighted" in case["mode"]:
        options["gate"] = "mean_similarity"
    policy = lookm.policy.resolve_policy(case["mode"], options)
    budget = parse_budget(None, case["important_ratio"], case["recent_ratio"])
    layer = LookMLayer(Settings(policy, budget, "dense", 1), Forward(data["image_mask"][None]), Growing())
    keys, values = layer.update(data["k"].clone(), data["v"].clone())
    layer.attend(lambda *_, **__: None, "sdpa", None, data["q"], keys, values, None)
    assert layer.stored == case["kept"]
    for difference in golden.differences(data, case, layer.keys, layer.values):
        assert difference.abs().max() <= 1e-5


def attention(policy: Policy, queries: int, valid: Tensor | None = None, **masking) -> Attention:
    """Random attention of 2 rows, 4 query heads, 2 KV heads, 13 tokens, over the last `queries` queries."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 13, 8, generator=generator) for heads in (4, 2))
    prompt = Prompt(torch.zeros(2, 13, dtype=torch.bool), valid, [6, 6], [3, 3], [0, 0])
    weight, picked = pick_queries(policy, prompt, queries)
    return Attention(query[:, :, -queries:], key, prompt, 0.3, query_weight=weight, picked=picked, **masking)


def by_loops(given: Attention, seen: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Column sums and visits [B, H, N] under seen [B, M, N], the queries weighted by weight [B, M]."""
    rows = range(2)
    sums = [
        column_sums(given.query[r], given.key[r], 0.3, False, seen[r].expand(4, -1, -1), weight[r].double())
        for r in rows
    ]
    visits = 2 * (seen * weight[:, :, None]).sum(1)
    return torch.stack(sums), visits[:, None].expand(-1, 2, -1)


HOLES = torch.ones(2, 13, dtype=torch.bool)
HOLES[0, [0, 1, 5, 12]] = False
LEFT = torch.arange(13) >= torch.tensor([4, 0])[:, None]
BLOCKS = (torch.arange(13)[:, None] // 4) >= (torch.arange(13) // 4)
CAUSAL = visible(13, 13)
MASKINGS = {
    "causal": ({}, None, CAUSAL[None]),
    "bidirectional": ({"causal": False}, None, torch.ones(1, 13, 13, dtype=torch.bool)),
    "left padding": ({"key_start": torch.tensor([4, 0], dtype=torch.int32)}, LEFT, CAUSAL & LEFT[:, None]),
    "holes": ({"mask": HOLES[:, None, None].expand(-1, 1, 13, -1)}, HOLES, CAUSAL & HOLES[:, None]),
    "4D": ({"causal": False, "mask": BLOCKS[None, None]}, None, BLOCKS[None]),
}


def finished(policy: Policy, given: Attention) -> Tensor:
    sums = policy.score(given)
    return policy.finish(Pairs(given.prompt, given.key, given.key, sums, sums))


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("queries", [13, 5])
def test_mean_h2o_is_attention_over_visits(masking: str, queries: int):
    arguments, valid, seen = MASKINGS[masking]
    arguments = dict(arguments)
    if "mask" in arguments:
        arguments["mask"] = arguments["mask"][..., -queries:, :]
    policy = POLICIES["mean_h2o"]
    given = attention(policy, queries, valid, **arguments)
    weight = torch.ones(2, queries) if valid is None else valid[:, -queries:].float()
    sums, visits = by_loops(given, seen[:, -queries:].expand(2, -1, -1), weight)
    ours = finished(policy, given)
    there = torch.ones(2, 13, dtype=torch.bool) if valid is None else valid
    expected = (sums / visits.clamp(min=1)).masked_fill(~there[:, None], 0)
    torch.testing.assert_close(ours.double(), expected.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"kernel_size": 3, "pooling": "max"}], ids=str)
def test_snapkv_looks_from_the_window_and_pools_what_is_before(options: dict):
    policy = type(POLICIES["snapkv"])(**options)
    given = attention(policy, 13, LEFT, key_start=torch.tensor([4, 0], dtype=torch.int32))
    ours = finished(policy, given)
    window, half = policy.window or given.prompt.recent[0], policy.kernel_size // 2
    weight = (torch.arange(13) >= 13 - window).float().expand(2, -1)
    sums, _ = by_loops(given, CAUSAL & LEFT[:, None], weight)
    sums[..., 13 - window :] = 0
    padded = torch.nn.functional.pad(sums, (half, half)).unfold(-1, policy.kernel_size, 1)
    expected = padded.amax(-1) if policy.pooling == "max" else padded.mean(-1)
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [1, 5, 9, 30])
def test_streaming_keeps_the_first_four_and_the_last(budget: int):
    cache, image = prefill(budget=budget, policy="streaming")
    sinks = min(4, budget // 2)
    expected = [*range(sinks), *range(len(image) - budget + sinks, len(image))]
    for layer in range(len(cache.layers)):
        assert (cache.kept_positions(layer) == torch.tensor(expected)).all()


@pytest.mark.parametrize("budget", [{"budget": 1}, {"important": 0.1, "recent": 0.1}, {"budget": "1KiB"}], ids=str)
def test_full_evicts_nothing(budget: dict):
    cache, image = prefill(policy="full", **budget)
    assert (cache.kept_positions(0) == torch.arange(len(image))).all()


@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy.text_prior])
@pytest.mark.parametrize("budget", [8, 20, 30])
def test_images_go_before_text(policy: str, budget: int):
    cache, image = prefill(budget=budget, policy=policy)
    recent = int(POLICIES[policy].recent_share * budget)
    text_outside = int((~image[: len(image) - recent]).sum())
    for layer in range(len(cache.layers)):
        for kept in cache.kept_positions(layer)[0]:
            important = kept[kept < len(image) - recent].long()
            assert len(important) == budget - recent
            assert int((~image[important]).sum()) == min(text_outside, budget - recent)


@pytest.mark.parametrize(("budget", "sinks", "layout"), [(8, 0, LAYOUT), (8, 3, (IMAGE, 12)), (40, 0, LAYOUT)])
def test_protected_text_exceeds_the_budget_by_what_it_needs(budget: int, sinks: int, layout: tuple):
    cache, image = prefill(layout, budget=budget, sinks=sinks, protect_text=True)
    recent = min(budget // 2, budget - min(sinks, budget // 2))
    outside = image[: len(image) - recent]
    needed = int((~outside).sum()) + int(outside[:sinks].sum())
    kept = cache.kept_positions(0)[0]
    assert kept.shape[1] == recent + max(budget - recent, needed)
    for head in kept:
        missing = set((~image).nonzero()[:, 0].tolist()) | set(range(sinks))
        assert not missing - set(head.tolist())


def test_a_gate_merges_less():
    tensors = [prefill(budget=8, rule="average", gate=gate)[0].layers[0].keys for gate in (None, "mean_similarity")]
    assert tensors[0].shape == tensors[1].shape == (1, 2, 8, HEAD_DIM)
    assert not torch.equal(*tensors)
