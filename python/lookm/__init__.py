"""LOOK-M for transformers: long multi-image prompts on 5-20 % of the KV cache (arXiv 2406.18139)."""

from lookm import _requirements  # noqa: F401  (before anything that imports transformers)
from lookm import policies as _registers_the_policies  # noqa: F401
from lookm.cache import LookMCache
from lookm.enable import disable, enable
from lookm.policy import POLICIES, Attention, Policy, Prompt, register_policy
from lookm.report import LayerReport, Report
from lookm_kernels._version import __version__

__all__ = [
    "POLICIES",
    "Attention",
    "LayerReport",
    "LookMCache",
    "Policy",
    "Prompt",
    "Report",
    "__version__",
    "disable",
    "enable",
    "register_policy",
]
