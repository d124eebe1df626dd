"""What a cache costs with a model, and gives: prefill, compression, time per token, bytes, and the floor beside.

The caches are timed alternately in one process: each reads the same prompt, then in every round each decodes one token
at the same length, so that two of them are compared pair by pair, whatever else the machine does meanwhile. The inputs
of a step are prepared by the model as in `generate`, and the compiled call is that of `generate`; sampling and stopping
are left out. Tokens are random: in the prompt of a vision-language model they are text ids, most of them marked as
image tokens (`image_mask`), so that the vision tower does not run.

The floor of a step is what must be read, weights and cache, at the rate at which this device reads or copies a buffer
far larger than its caches (the faster of the two), measured in the same rounds.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CompileConfig, DynamicCache, StaticCache

from lookm.cache import LookMCache
from lookm.modality import cache_keyword, media_token_ids
from lookm.options import FORMATS
from lookm.report import Report, layer_report
from lookm.speed import Result, Row

FULL = "DynamicCache"
STATIC = "StaticCache"
FIXED, COMPILED = ", fixed size", ", compiled"
# the first calls compile, and capture a graph
WARM_STEPS = 4
WARM_TOKENS = 256
PREFILLS, SECONDS_OF_PREFILLS = 3, 60.0
# a large processor has hundreds of MB of cache
BUFFER_BYTES = 1 << 30
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
OUT_OF_MEMORY = "out of memory"


class Prompt(NamedTuple):
    """ids [B, N]; image_mask [B, N] bool, None for a model of text; later [B, steps]: what follows, a token a step."""

    ids: Tensor
    image_mask: Tensor | None
    later: Tensor

    def beginning(self, tokens: int) -> Prompt:
        """A shorter prompt."""
        mask = self.image_mask
        return self._replace(ids=self.ids[:, :tokens], image_mask=mask if mask is None else mask[:, :tokens])


def random_prompt(model: Any, batch: int, tokens: int, new_tokens: int) -> Prompt:
    """No placeholder among the ids; for a vision-language model, images are all but the first and last sixteenth."""
    media = media_token_ids(model.config)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    text = torch.tensor([token for token in range(vocabulary) if token not in media], device=model.device)
    ids = text[torch.randint(len(text), (batch, tokens + WARM_STEPS + new_tokens), device=model.device)]
    mask = None
    if media:
        mask = torch.zeros(batch, tokens, dtype=torch.bool, device=model.device)
        mask[:, tokens // 16 : tokens - tokens // 16] = True
    return Prompt(ids[:, :tokens], mask, ids[:, tokens:])


@dataclass(frozen=True)
class Variant:
    """make(model, prompt): an empty cache with room for the prompt and what follows; compiled: its decoding is."""

    name: str
    make: Callable[[Any, Prompt], Any]
    compiled: bool = False


def dynamic_cache(model: Any, prompt: Prompt) -> DynamicCache:
    """The full cache of transformers, which grows."""
    return DynamicCache(config=model.config)


def static_cache(model: Any, prompt: Prompt) -> StaticCache:
    """The full cache of transformers, in buffers of the whole length."""
    return StaticCache(config=model.config, max_cache_len=prompt.ids.shape[1] + prompt.later.shape[1])


def lookm_cache(
    budget: float | int | str, policy: str, fixed: bool = False, **options: Any
) -> Callable[[Any, Prompt], LookMCache]:
    """How to make a LookMCache; fixed: in buffers with slots for what follows; options: further arguments of it."""

    def make(model: Any, prompt: Prompt) -> LookMCache:
        slots = prompt.later.shape[1] if fixed else None
        return LookMCache(model, budget, policy, image_mask=prompt.image_mask, max_new_tokens=slots, **options)

    return make


def variants(budgets: Sequence[float | int | str], policy: str = "auto", compiled: bool = False) -> list[Variant]:
    """The full cache, growing and of fixed size, then compressed ones of every budget, whole and in few bits.

    compiled: those of fixed size decode compiled too, as `generate` has it on a GPU.
    """
    found = [Variant(FULL, dynamic_cache)]
    fixed = [Variant(STATIC, static_cache)]
    for budget in budgets:
        found.append(Variant(compressed(budget), lookm_cache(budget, policy)))
        for format in FORMATS:
            found.append(Variant(f"{compressed(budget)}, {format}", lookm_cache(budget, policy, quantize=format)))
        fixed.append(Variant(compressed(budget) + FIXED, lookm_cache(budget, policy, fixed=True)))
    return found + fixed + [Variant(each.name + COMPILED, each.make, True) for each in fixed if compiled]


def compressed(budget: float | int | str) -> str:
    """What a LookMCache of a budget is called."""
    return f"LookMCache {100 * budget:g} %" if isinstance(budget, float) else f"LookMCache {budget}"


class Run:
    """One cache under way.

    first, logits [B, V]: those after the prompt, and those of the last forward; prefills, steps: seconds of each so
    far; peak_bytes: allocated at most for this cache, 0 where it is not counted.
    """

    def __init__(self, model: Any, variant: Variant, prompt: Prompt) -> None:
        self.model, self.variant, self.prompt = model, variant, prompt
        known = inspect.signature(model.forward).parameters
        self.arguments = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in known else {})
        self.drop()

    def drop(self) -> None:
        """Free what it holds, and forget what was measured."""
        self.cache: Any = None
        self.first: Tensor | None = None
        self.logits: Tensor | None = None
        self.prefills: list[float] = []
        self.steps: list[float] = []
        self.cache_bytes = self.peak_bytes = 0

    def read(self) -> None:
        """Read the prompt into a new cache."""
        self.cache, self.cache_bytes = None, 0
        self.cache = self.variant.make(self.model, self.prompt)
        self.prefills.append(self._timed(self.model, self.prompt.ids, 0, is_first_iteration=True))
        self.first, self.cache_bytes = self.logits, cache_bytes(self.cache)

    def step(self) -> None:
        """Read the next token."""
        done = len(self.steps)
        call = compiled_call(self.model) if self.variant.compiled else self.model
        self.steps.append(self._timed(call, self.prompt.later[:, done, None], self.prompt.ids.shape[1] + done))

    def _timed(self, call: Callable[..., Any], ids: Tensor, begin: int, **how: Any) -> float:
        device = self.model.device
        before = _allocated(device)
        start = _now(device)
        positions = torch.arange(begin, begin + ids.shape[1], device=device).expand(ids.shape)
        inputs = self.model.prepare_inputs_for_generation(
            ids, position_ids=positions, **{cache_keyword(self.model): self.cache}, **self.arguments, **how
        )
        # a copy, as in generate: a graph writes its next result over this one
        self.logits = call(**inputs, return_dict=True).logits[:, -1].to(torch.float32, copy=True)
        self.logits.argmax(-1)
        seconds = _now(device) - start
        if before is not None:
            added = torch.cuda.max_memory_allocated(device) - before
            self.peak_bytes = max(self.peak_bytes, self.cache_bytes + added)
        return seconds


def compiled_call(model: Any) -> Callable[..., Any]:
    """The model's forward as generate compiles it; on a processor without CUDA graphs."""
    config = CompileConfig() if model.device.type == "cuda" else CompileConfig(mode="default")
    call: Callable[..., Any] = model.get_compiled_call(config)
    return call


def cache_bytes(cache: Any) -> int:
    """Bytes that any cache of transformers holds, buffers whole."""
    return Report([layer_report(index, layer) for index, layer in enumerate(cache.layers)]).bytes


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _allocated(device: torch.device) -> int | None:
    """Bytes allocated now, from which the peak is counted anew; None on a processor."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


class Memory:
    """How fast a device reads, as a matrix-vector product does, or copies: buffers of that many bytes."""

    def __init__(self, device: torch.device, buffer_bytes: int) -> None:
        self.device, width = device, 4096
        self.matrix = torch.ones(max(1, buffer_bytes // (4 * width)), width, device=device)
        self.vector = torch.ones(width, device=device)
        self.copy = self.matrix.clone()

    def bytes_per_s(self) -> float:
        """The faster of one read and one copy, which moves every byte twice."""
        calls = ((1, lambda: self.matrix.mv(self.vector)), (2, lambda: self.copy.copy_(self.matrix)))
        return max(times * self.matrix.nbytes / self._seconds(call) for times, call in calls)

    def _seconds(self, call: Callable[[], Any]) -> float:
        start = _now(self.device)
        call()
        return _now(self.device) - start


def weight_bytes(model: Any, prompt: Prompt) -> int | None:
    """Bytes of the parameters that a step reads, none of embeddings; None with experts, which a token chooses."""
    text = model.config.get_text_config(decoder=True)
    if any(getattr(text, name, None) for name in EXPERTS):
        return None
    run = Run(model, Variant(FULL, dynamic_cache), prompt)
    run.read()
    ran: list[nn.Module] = []
    hooks = [module.register_forward_hook(lambda module, *_: ran.append(module)) for module in model.modules()]
    try:
        run.step()
    finally:
        for hook in hooks:
            hook.remove()
    read = {weight for module in ran if not isinstance(module, nn.Embedding) for weight in module.parameters(False)}
    return sum(weight.nbytes for weight in read)


@torch.no_grad()
def measure(
    model: Any, prompt: Prompt, chosen: Sequence[Variant], buffer_bytes: int | None = None, prefills: int = PREFILLS
) -> Result:
    """Time every variant; what does not fit beside the others is timed without them, what never fits has a row too.

    buffer_bytes: of the buffer that tells the memory's rate, BUFFER_BYTES by default. prefills: how often each reads
    the prompt at most; no more once that took a minute.
    """
    # what was compiled for earlier prompts counts against a limit, beyond which torch gives up without an error
    torch.compiler.reset()
    for variant in chosen:
        Run(model, variant, prompt.beginning(WARM_TOKENS)).read()
    weights = weight_bytes(model, prompt.beginning(WARM_TOKENS))
    memory = Memory(model.device, buffer_bytes or BUFFER_BYTES)
    rows = {variant.name: Row(variant=variant.name, missing=OUT_OF_MEMORY) for variant in chosen}
    rates: list[float] = []
    left, together = [Run(model, variant, prompt) for variant in chosen], 0
    while left:
        _read_all(left, prefills)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            rates_now = _decode(left, memory)
        finished = [run for run in left if run.cache is not None]
        if not finished:
            break
        full = next((run for run in finished if run.variant.name == FULL), None)
        for run in finished:
            rows[run.variant.name] = _row(run, full, weights, rates_now, together)
        for run in finished:
            run.drop()
        rates += rates_now
        left, together = [run for run in left if run not in finished], together + 1
    on_gpu = model.device.type == "cuda"
    return Result(
        device=torch.cuda.get_device_name(model.device) if on_gpu else "cpu",
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        batch=prompt.ids.shape[0],
        prompt_tokens=prompt.ids.shape[1],
        new_tokens=prompt.later.shape[1] - WARM_STEPS,
        weight_bytes=weights,
        bytes_per_s=median(rates or [memory.bytes_per_s()]),
        rows=list(rows.values()),
    )


def _read_all(runs: Sequence[Run], prefills: int) -> None:
    """Every run reads the prompt, a few times in turn; what does not fit holds nothing afterwards."""
    start = time.perf_counter()
    fits = list(runs)
    for _ in range(prefills):
        fits = [run for run in fits if _fits(run, run.read)]
        if time.perf_counter() - start > SECONDS_OF_PREFILLS:
            break


def _decode(runs: Sequence[Run], memory: Memory) -> list[float]:
    """Every run that holds a prompt reads all later tokens, the first one changing; the rates of the timed rounds."""
    rates = []
    fits = [run for run in runs if run.cache is not None]
    for _ in range(runs[0].prompt.later.shape[1]):
        fits = [run for run in fits[1:] + fits[:1] if _fits(run, run.step)]
        rates.append(memory.bytes_per_s())
    return rates[WARM_STEPS:]


def _fits(run: Run, call: Callable[[], None]) -> bool:
    """Make a call of a run; where memory does not suffice, the run drops what it has."""
    try:
        call()
    except torch.OutOfMemoryError:
        run.drop()
        torch.cuda.empty_cache()
        return False
    return True


def _row(run: Run, full: Run | None, weights: int | None, rates: Sequence[float], together: int) -> Row:
    """What a finished run measured; full: the run of the full cache that was timed beside it."""
    steps = run.steps[WARM_STEPS:]
    read = None if weights is None else weights + run.cache_bytes
    held = sum(x.nbytes for x in (*run.model.parameters(), *run.model.buffers()))
    row = Row(
        variant=run.variant.name,
        prefill_s=median(run.prefills),
        first_step_s=run.steps[0],
        step_s=median(steps),
        fastest_s=min(steps),
        tokens_per_s=run.prompt.ids.shape[0] / median(steps),
        cache_bytes=run.cache_bytes,
        peak_bytes=held + run.peak_bytes if run.peak_bytes else None,
        floor_s=None if read is None else read / median(rates),
        over_floor=None if read is None else median(s * rate / read for s, rate in zip(steps, rates, strict=True)),
        together=together,
        prefills=run.prefills,
        steps=steps,
    )
    if full is None or full is run:
        return row
    added = median(ours - theirs for ours, theirs in zip(run.prefills, full.prefills, strict=True))
    return replace(
        row,
        compression_s=added if run.cache_bytes < full.cache_bytes else None,
        faster=median(theirs / ours for ours, theirs in zip(steps, full.steps[WARM_STEPS:], strict=True)),
        prompt_error=_difference(run.first, full.first),
        last_error=_difference(run.logits, full.logits),
    )


def _difference(logits: Tensor | None, expected: Tensor | None) -> float | None:
    if logits is None or expected is None:
        return None
    return float((logits - expected).norm() / expected.norm())
