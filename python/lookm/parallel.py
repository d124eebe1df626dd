"""One model over the processes that torchrun starts: transformers' tensor parallelism, each with its own heads.

Importing this loads no torch: the command line asks it how many processes there are.
"""

from __future__ import annotations

import os
import secrets
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from lookm.policy import Policy

OWN_DEVICE = "`device` must be auto under torchrun, where each process takes the GPU of its own number; got {device!r}"
NOT_EVEN = "model {name} has {heads} key/value heads, which {processes} processes cannot share evenly"
NO_PLAN = (
    "model {name} ({kind}) cannot be split over {processes} processes: transformers {version} has no tensor parallel "
    "plan for its attention, and each would hold the whole cache; run it in one process"
)
NOT_BY_HEAD = (
    "lookm: {what} looks at all heads of a layer together, and under tensor parallelism a process has only "
    "some of them: not supported"
)


def processes() -> int:
    """How many processes share the model: what torchrun says, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process among them; the first, 0, prints."""
    return int(os.environ.get("RANK", "0"))


def own_gpu() -> str:
    """The GPU of this process; the current one without torchrun."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if processes() > 1 else "cuda"


def one_process(command: str) -> None:
    """ValueError where a command that is made for one process runs in several."""
    if processes() > 1:
        raise ValueError(f"`lookm {command}` runs in one process; under torchrun there is `lookm generate`")


def split_arguments() -> dict[str, Any]:
    """Arguments of from_pretrained that split a model over the processes, by the plan that transformers has for it."""
    from transformers.distributed import DistributedConfig

    # its name in newer releases, which will drop the argument
    if hasattr(DistributedConfig, "tp_plan"):
        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    return {"tp_plan": "auto"}


def checked_split(name: str, kind: Any, config: Any, device: str) -> dict[str, Any]:
    """split_arguments for a checkpoint of that configuration and auto class.

    ValueError, before any weights are read, for a device of one's own, for heads that do not share out evenly, and
    where transformers' plan leaves the attention whole.
    """
    import torch
    from transformers import __version__

    if device != "auto":
        raise ValueError(OWN_DEVICE.format(device=device))
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if heads % processes():
        raise ValueError(NOT_EVEN.format(name=name, heads=heads, processes=processes()))
    with torch.device("meta"):
        plan = kind.from_config(config).tp_plan or {}
    if not any("attn" in module or "attention" in module for module in plan):
        raise ValueError(NO_PLAN.format(name=name, kind=config.model_type, processes=processes(), version=__version__))
    return split_arguments()


def check_policy(model: Any, policy: Policy) -> None:
    """NotImplementedError where a model is split and the policy would need the heads of the other processes."""
    if (getattr(model, "tp_size", None) or 1) == 1:
        return
    if policy.gate is not None or not policy.by_head:
        what = f"policy {type(policy).__name__}" if policy.gate is None else f"gate {policy.gate!r}"
        raise NotImplementedError(NOT_BY_HEAD.format(what=what))


def shared_seed(seed: int | None) -> int | None:
    """The seed, or one that all processes have: with one of its own, each would go on with another token."""
    if seed is not None or processes() == 1:
        return seed
    from torch import distributed

    drawn = [secrets.randbits(63)]
    distributed.broadcast_object_list(drawn)
    return drawn[0]


def leave() -> NoReturn:
    """End a process that is done, once all are."""
    from torch import distributed

    distributed.barrier()
    distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # a thread of gloo that outlives its group aborts the interpreter's own way out, once in a while
    os._exit(0)
