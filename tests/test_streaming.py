"""The table of conversations longer than the budget: what it measures of a decoder, against one forward over it all."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

from quality.streaming import TURN, added_nll
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from lookm import LookMCache


def decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # unit gain, so that attention is not uniform
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


@torch.no_grad()
def test_the_second_half_read_in_turns_costs_what_it_costs_at_once() -> None:
    model, ids = decoder(), torch.randint(0, 64, (1, 5 * TURN))
    losses = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
    expected = float(losses[ids.shape[1] // 2 :].mean())
    for cache in (DynamicCache(config=model.config), LookMCache(model, 5 * TURN, "auto", generated="window")):
        nll, most = added_nll(model, ids, cache)
        assert nll == pytest.approx(expected, rel=1e-5)
        assert most == 5 * TURN


def test_a_budget_is_kept_and_costs_something() -> None:
    model, ids = decoder(), torch.randint(0, 64, (1, 5 * TURN))
    full, _ = added_nll(model, ids, DynamicCache(config=model.config))
    nll, most = added_nll(model, ids, LookMCache(model, 40, "auto", generated="window"))
    assert most == 40
    assert nll != pytest.approx(full, rel=1e-3)
