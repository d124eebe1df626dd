"""LOOK-M for transformers: long multi-image prompts on 5-20 % of the KV cache (arXiv 2406.18139)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lookm import _requirements  # noqa: F401  (before anything that imports transformers)
from lookm.errors import check_torchvision

if TYPE_CHECKING:
    from lookm.attention import Attention, Pairs
    from lookm.cache import LookMCache
    from lookm.policy import POLICIES, Merging, Policy, register_policy
    from lookm.profile import layer_profile
    from lookm.prompt import Prompt
    from lookm.report import LayerReport, Report
    from lookm.switch import disable, enable
    from lookm.turns import next_turn
    from lookm_kernels._version import __version__

# imported when first asked for: the command line answers --help without torch and transformers
_HOME = {
    "POLICIES": "lookm.policy",
    "Attention": "lookm.attention",
    "LayerReport": "lookm.report",
    "LookMCache": "lookm.cache",
    "Merging": "lookm.policy",
    "Pairs": "lookm.attention",
    "Policy": "lookm.policy",
    "Prompt": "lookm.prompt",
    "Report": "lookm.report",
    "__version__": "lookm_kernels._version",
    "disable": "lookm.switch",
    "enable": "lookm.switch",
    "layer_profile": "lookm.profile",
    "next_turn": "lookm.turns",
    "register_policy": "lookm.policy",
}

__all__ = [
    "POLICIES",
    "Attention",
    "LayerReport",
    "LookMCache",
    "Merging",
    "Pairs",
    "Policy",
    "Prompt",
    "Report",
    "__version__",
    "disable",
    "enable",
    "layer_profile",
    "next_turn",
    "register_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOME[name] == "lookm.policy":
        import_module("lookm.published")  # which registers those that come with the package
    try:
        home = import_module(_HOME[name])
    except ImportError:
        check_torchvision()  # which transformers would blame on a class of its own
        raise
    value = globals()[name] = getattr(home, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
