"""The numbers to reach: which result file holds each, its limit and its unit."""

from __future__ import annotations

from typing import Any, NamedTuple

# how rows of this package are named, by the backend that runs by default
OURS = "lookm-kernels"


class Target(NamedTuple):
    """`limit` is the most where `at_most`, else the least; measured values are in the same unit."""

    benchmark: str
    text: str
    at_most: bool
    limit: float
    unit: str

    def met(self, measured: float) -> bool:
        """Whether a measured value reaches the limit."""
        return measured <= self.limit if self.at_most else measured >= self.limit

    def shown(self) -> str:
        """The limit as tables show it."""
        return f"{'<=' if self.at_most else '>='} {self.value(self.limit)}"

    def value(self, number: float) -> str:
        """A value of this target as tables show it."""
        return f"{number:.3g}{self.unit}"

    def result(self, measured: float) -> dict[str, Any]:
        """What a result file says of this target."""
        return {"target": self.shown(), "measured": measured, "met": self.met(measured)}


SCORES = "scores, 32 query and 8 KV heads, 32k x 32k, causal"
MERGE = "nearest + merge + compact, 32k, 20 %, 8 heads"
DECODE = "a decode step shaped like LLaVA-1.5-7B at 32k, 20 %, fixed size and compiled"
PREFILL = "compression of all layers in a 32k prefill shaped like Qwen2.5-VL-7B, added time as a share of the prefill"
IN_CUDA = "in CUDA C++, at the target's shape: faster than Triton, or it need not stay"
GPU_TARGETS = {
    "scores_rate": Target("scores", f"{SCORES}, LSE given: rate", False, 450, " TFLOP/s"),
    "scores_sdpa": Target("scores", f"{SCORES}, LSE given: time over SDPA flash forward", True, 0.55, ""),
    "scores_colreduce": Target("scores", f"{SCORES}, without LSE: faster than flash-colreduce", False, 2, "x"),
    "select_time": Target("select", "select, 32 rows of 32k, 20 %: time", True, 40, " us"),
    "select_topk": Target("select", "select, 32 rows of 32k, 20 %: faster than torch.topk + sort", False, 5, "x"),
    "select_cuda": Target("select", f"select {IN_CUDA}", False, 1.15, "x"),
    "merge_cuda": Target("merge", f"merge {IN_CUDA}", False, 1.15, "x"),
    "compact_cuda": Target("merge", f"compact {IN_CUDA}", False, 1.15, "x"),
    "merge_time": Target("merge", f"{MERGE}: time", True, 1.5, " ms"),
    "merge_memory": Target("merge", f"{MERGE}: peak extra memory over the layer's KV", True, 10, " %"),
    "merge_hub": Target("merge", f"{MERGE}: time when all tokens merge into one, over the even case", True, 2, "x"),
    "prefill_exact": Target("compress", f"{PREFILL}: exact scores", True, 25, " %"),
    "prefill_text": Target("compress", f"{PREFILL}: text queries only", True, 3, " %"),
    "prefill_window": Target("compress", f"{PREFILL}: the last 32 queries only", True, 3, " %"),
    "decode_dynamic": Target("generate", f"{DECODE}: faster than DynamicCache", False, 2.5, "x"),
    "decode_static": Target("generate", f"{DECODE}: faster than StaticCache compiled", False, 1.6, "x"),
    "decode_floor": Target("generate", f"{DECODE}: time over the bandwidth floor", True, 1.25, "x"),
    "decode_batch": Target(
        "generate", "the largest batch at 32k that fits, LLaVA-1.5-7B, 5 % over DynamicCache: tokens/s", False, 8, "x"
    ),
}
REFERENCE = "reference backend, 1 x 32 x 4096 x 128, against the attention matrix in memory"
DECODER = "a decode step of a decoder of 100 M parameters at 8k, 20 %, fixed size"
CPU_TARGETS = {
    "time_ratio": Target("reference", f"{REFERENCE}: time", True, 1, "x"),
    "memory_ratio": Target("reference", f"{REFERENCE}: peak memory", True, 1 / 8, "x"),
    "decode_grown": Target("generate", f"{DECODER}: time over the cache that grows", True, 1, "x"),
    "decode_floor": Target("generate", f"{DECODER}: time over the bandwidth floor", True, 1.25, "x"),
    "decode_full": Target("generate", f"{DECODER}: faster than DynamicCache", False, 3, "x"),
}
