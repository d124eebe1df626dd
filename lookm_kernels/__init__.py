"""LOOK-M (arXiv 2406.18139) as torch ops: score, select, merge and compact a key/value cache.

Shapes: B batch, Hq query heads, H key/value heads, M queries, N cached tokens, D head dimension, K kept, E evicted.
"""

from lookm_kernels import rules
from lookm_kernels._dispatch import use_backend
from lookm_kernels._version import __version__ as __version__
from lookm_kernels.combine import combine_attention
from lookm_kernels.compact import compact_
from lookm_kernels.compress import compress_
from lookm_kernels.fp8 import quantize_heads
from lookm_kernels.kept_attention import kept_attention
from lookm_kernels.merge import merge_
from lookm_kernels.nearest import nearest_kept
from lookm_kernels.quantize import QuantizedPairs, dequantize_pairs, quantize_pairs
from lookm_kernels.quantized_attention import quantized_attention
from lookm_kernels.rules import merge_weights, register_rule
from lookm_kernels.scores import attention_scores
from lookm_kernels.select import select_tokens

__all__ = [
    "QuantizedPairs",
    "attention_scores",
    "combine_attention",
    "compact_",
    "compress_",
    "dequantize_pairs",
    "kept_attention",
    "merge_",
    "merge_weights",
    "nearest_kept",
    "quantize_heads",
    "quantize_pairs",
    "quantized_attention",
    "register_rule",
    "rules",
    "select_tokens",
    "use_backend",
]
