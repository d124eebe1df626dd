"""LookMCache on every family: a whole budget changes nothing, a smaller one does what the loops say."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from families import FAMILIES, IMAGE, MLLAMA, TALL, VIDEO, Family, Prompt, full_layers, image_mask, said  # noqa: E402
from loops import RECIPES, Recipe, teacher_forced  # noqa: E402
from transformers import Cache, DynamicCache, PreTrainedModel  # noqa: E402

from lookm import LookMCache, plan  # noqa: E402

LAYOUTS = [(6, IMAGE, 9, TALL, 7), (5, IMAGE, 4), (21,), (4, VIDEO, 11)]
TOKENS = 6
MODES = {
    "greedy": {"do_sample": False},
    "beam": {"num_beams": 3, "do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
}
SCORELESS = ("full", "streaming", "snapkv")  # policies of which the loops know nothing
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    family = FAMILIES[request.param]
    if not family.dynamic:
        pytest.skip(f"transformers {transformers.__version__} has no DynamicCache for {family.name}")
    return family


@pytest.fixture(params=["sdpa", "eager"])
def model(request, family: Family) -> PreTrainedModel:
    return family.model(request.param)


def ragged(family: Family) -> list[Prompt]:
    return [family.prompt(layout, seed) for seed, layout in enumerate(LAYOUTS)]


def grown(prompts: Sequence[Prompt], more: Sequence[Prompt]) -> list[Prompt]:
    return [old + new for old, new in zip(prompts, more, strict=True)]


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], cache: Cache, **mode) -> tuple[Tensor, Tensor]:
    """The new ids [B, T] and their logits [B, T, V] before any processing."""
    torch.manual_seed(0)
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True} | mode
    result = model.generate(**inputs, past_key_values=cache, max_new_tokens=TOKENS, **options)
    return result.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(result.logits, 1)


@torch.no_grad()
def read(family: Family, model: PreTrainedModel, cache: Cache, turns: Sequence[Sequence[Prompt]]) -> list[Tensor]:
    """Logits [B, n, V] of the forwards that feed the turns one after another."""
    seen, logits = [Prompt(())] * len(turns[0]), []
    for turn in turns:
        logits.append(model(**family.turn(model, seen, turn), past_key_values=cache, use_cache=True).logits)
        seen = grown(seen, turn)
    return logits


def expected(family: Family, model: PreTrainedModel, prompt: Prompt, more: Prompt, recipe: Recipe) -> Tensor:
    """What the loops give from the prompt's last token on: [len(more) + 1, V]."""
    inputs = family.inputs([prompt + more])
    return teacher_forced(model, inputs, len(prompt), image_mask(inputs["input_ids"])[0], recipe)


def assert_follows_loops(
    family: Family, model: PreTrainedModel, prompts: Sequence[Prompt], recipe: Recipe, cache: Cache
) -> None:
    ids, logits = generate(model, family.inputs(prompts), cache, do_sample=True)
    for row, (prompt, more) in enumerate(zip(prompts, said(ids), strict=True)):
        torch.testing.assert_close(logits[row], expected(family, model, prompt, more, recipe)[:-1], **CLOSE)


@pytest.mark.parametrize("mode", MODES)
def test_a_whole_budget_changes_nothing(
    family: Family, model: PreTrainedModel, mode: str, monkeypatch: pytest.MonkeyPatch
):
    # a prompt that fits is normally left alone: here it is scored, selected and compacted all the same
    monkeypatch.setattr(plan, "over_budget", lambda prompt, lengths: True)
    prompts = ragged(family)
    for batch in ([prompts[0]], prompts):
        inputs = family.inputs(batch)
        ids, logits = generate(model, inputs, LookMCache(model, budget=1.0), **MODES[mode])
        plain_ids, plain_logits = generate(model, inputs, DynamicCache(config=model.config), **MODES[mode])
        assert torch.equal(ids, plain_ids)
        assert torch.equal(logits, plain_logits)


def test_a_whole_budget_of_loops_is_the_model(family: Family):
    model, prompt, more = family.model("sdpa"), family.prompt(LAYOUTS[0]), family.prompt((8,), 1)
    with torch.no_grad():
        plain = model(**family.inputs([prompt + more]), use_cache=False).logits[0, len(prompt) - 1 :]
    torch.testing.assert_close(expected(family, model, prompt, more, Recipe(budget=1.0)), plain, **CLOSE)


@torch.no_grad()
def test_a_small_budget_leaves_the_prompt_as_it_is(family: Family, model: PreTrainedModel):
    """The forward that compresses gives DynamicCache's bits: the model's own tensors stay what they are."""
    for batch in (ragged(family)[:1], ragged(family)):
        inputs = family.inputs(batch)
        logits = [
            model(**inputs, past_key_values=cache).logits
            for cache in (LookMCache(model, budget=0.2), DynamicCache(config=model.config))
        ]
        assert torch.equal(*logits)


@torch.no_grad()
def test_scores_are_the_column_sums_of_the_attention(family: Family, model: PreTrainedModel):
    """Those of eager attention's own weights, which transformers returns."""
    inputs = family.inputs(ragged(family))
    held = LookMCache(model, 0.5, "h2o", prompt_length=10**6)
    model(**inputs, past_key_values=held)
    plain = DynamicCache(config=model.config)
    attentions = family.model("eager")(**inputs, past_key_values=plain, output_attentions=True).attentions
    if len(attentions) < len(held.layers):  # linear layers have none
        attentions = dict(zip(full_layers(model), attentions, strict=True))
    for layer in full_layers(model):
        weights = attentions[layer].masked_fill(inputs["attention_mask"][:, None, :, None] == 0, 0.0)
        scores = held.layers[layer].scores
        expected = weights.sum(2).view(*scores.shape[:2], -1, scores.shape[2]).sum(2)
        torch.testing.assert_close(scores, expected, **CLOSE)


def test_a_small_budget_follows_the_loops_in_both_turns(family: Family, model: PreTrainedModel):
    prompts, cache = ragged(family), LookMCache(model, budget=0.3, later_turns="dense")
    first, first_logits = generate(model, family.inputs(prompts), cache, do_sample=True)
    questions = [family.prompt((5,), seed) for seed in range(len(prompts))]
    asked = grown(grown(prompts, said(first)), questions)
    second, second_logits = generate(model, family.inputs(asked, shown=[]), cache, do_sample=True)
    assert cache.get_seq_length() == max(map(len, asked)) + TOKENS - 1
    assert second_logits.isfinite().all()
    resumes = family.resumes(model, family.inputs(prompts))
    for row, (prompt, whole) in enumerate(zip(prompts, grown(asked, said(second)), strict=True)):
        more = Prompt(whole.ids[len(prompt) :])
        logits = expected(family, model, prompt, more, Recipe(budget=0.3))[:-1]
        torch.testing.assert_close(first_logits[row], logits[:TOKENS], **CLOSE)
        if resumes:
            torch.testing.assert_close(second_logits[row], logits[-TOKENS:], **CLOSE)


@pytest.mark.parametrize("budget", [1.0, 0.3])
def test_a_second_turn_with_an_image(family: Family, model: PreTrainedModel, budget: float):
    if not family.later_images:
        pytest.skip(f"transformers {transformers.__version__}: a DynamicCache fails here too")
    prompts = ragged(family)
    turns = [prompts]
    for step, layout in enumerate([(3,), (4, IMAGE, 3), (1,), (1,)]):
        turns.append([family.prompt(layout, 10 * step + row) for row in range(len(prompts))])
    cache = LookMCache(model, budget=budget, later_turns="dense")
    logits = read(family, model, cache, turns)
    assert cache.get_seq_length() == max(map(len, prompts)) + sum(len(turn[0]) for turn in turns[1:])
    if budget == 1.0:
        plain = read(family, model, DynamicCache(config=model.config), turns)
        assert all(map(torch.equal, logits, plain))
        return
    later = torch.cat(logits[1:], 1)
    for row, prompt in enumerate(prompts):
        more = sum((turn[row] for turn in turns[1:]), Prompt(()))
        reference = expected(family, model, prompt, more, Recipe(budget=budget))
        torch.testing.assert_close(later[row], reference[1:], **CLOSE)


def test_a_second_turn_by_generate_with_an_image(family: Family, model: PreTrainedModel):
    if not family.later_images:
        pytest.skip(f"transformers {transformers.__version__}: a DynamicCache fails here too")
    if family.mrope:
        pytest.skip("generate wants all images for the positions and only the new ones for the vision tower")
    prompts, results = ragged(family)[:2], []
    caches = [LookMCache(model, budget=budget, later_turns="dense") for budget in (1.0, 0.3)]
    for cache in (*caches, DynamicCache(config=model.config)):
        first, _ = generate(model, family.inputs(prompts), cache)
        turn = [family.prompt((4, IMAGE, 3), seed) for seed in range(len(prompts))]
        asked = grown(grown(prompts, said(first)), turn)
        results.append(generate(model, family.inputs(asked, shown=turn), cache))
        assert cache.get_seq_length() == max(map(len, asked)) + TOKENS - 1
    whole, small, plain = results
    assert all(map(torch.equal, whole, plain))
    assert small[1].isfinite().all()


def test_rows_of_a_batch_equal_the_row_alone(family: Family, model: PreTrainedModel):
    prompts = ragged(family)
    ids, logits = generate(model, family.inputs(prompts), LookMCache(model, budget=0.25))
    for row, prompt in enumerate(prompts):
        alone_ids, alone_logits = generate(model, family.inputs([prompt]), LookMCache(model, budget=0.25))
        assert torch.equal(ids[row], alone_ids[0])
        torch.testing.assert_close(logits[row], alone_logits[0], **CLOSE)


@pytest.mark.parametrize("policy", [*RECIPES, *SCORELESS])
def test_policies(policy: str):
    family = FAMILIES["llava"]
    model, prompts = family.model("sdpa"), ragged(family)
    inputs = family.inputs(prompts)
    whole = generate(model, inputs, LookMCache(model, budget=1.0, policy=policy))
    plain = generate(model, inputs, DynamicCache(config=model.config))
    assert all(map(torch.equal, whole, plain))
    cache = LookMCache(model, budget=0.4, policy=policy)
    if policy in SCORELESS:
        _, logits = generate(model, inputs, cache)
        assert logits.isfinite().all()
        assert torch.equal(logits, plain[1]) == (policy == "full")
    else:
        assert_follows_loops(family, model, prompts, replace(RECIPES[policy], budget=0.4), cache)


OPTIONS = [
    {"budget": 12},
    {"budget": 1},
    {"recent_share": 0.2},
    {"sinks": 3},
    {"rule": "weighted"},
    {"gate": "mean_similarity"},
    {"rule": "average", "gate": "mean_similarity"},
    {"protect_text": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(f"{name}={x}" for name, x in options.items()))
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_options(name: str, options: dict):
    family, settings = FAMILIES[name], {"budget": 0.4} | options
    model = family.model("sdpa")
    cache = LookMCache(model, **settings)
    gated = settings.pop("gate", None) is not None
    assert_follows_loops(family, model, ragged(family), Recipe(**settings, gated=gated), cache)


def test_only_full_attention_is_compressed():
    family = FAMILIES["gemma3"]
    model = family.model("sdpa")
    layers, plain = LookMCache(model, budget=10).layers, DynamicCache(config=model.config).layers
    assert full_layers(model) == [i for i, layer in enumerate(layers) if type(layer) is not type(plain[i])]


def test_mllama_is_refused():
    with pytest.raises((NotImplementedError, ValueError), match="mllama"):
        LookMCache(MLLAMA.model(), budget=0.2)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.hybrid])
def test_hybrids_with_a_cache_class_of_their_own_are_refused(name: str):
    if FAMILIES[name].dynamic:
        pytest.skip(f"transformers {transformers.__version__} keeps the state of {name} in a DynamicCache")
    with pytest.raises((NotImplementedError, ValueError), match="linear"):
        LookMCache(FAMILIES[name].model(), budget=0.2)
