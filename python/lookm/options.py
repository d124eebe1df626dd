"""The options of a LookMCache that are no policy's, and which of them go together."""

from __future__ import annotations

from lookm.policy import is_count

LATER_TURNS = ("dense", "segment")
FORMATS = ("int8", "fp8", "int4")
GENERATED = ("whole", "window")
WHEN_FULL = ("raise", "double")


def check_options(
    later_turns: str | None,
    prompt_length: int | None,
    max_new_tokens: int | None,
    when_full: str,
    quantize: str | None,
    generated: str,
    compress_every: int,
) -> None:
    """ValueError, which names the option, for a value or a pair of them that is not accepted."""
    for name, value, accepted in (
        ("later_turns", later_turns, (None, *LATER_TURNS)),
        ("when_full", when_full, WHEN_FULL),
        ("generated", generated, GENERATED),
        ("quantize", quantize, (None, *FORMATS)),
    ):
        if value not in accepted:
            raise ValueError(f"`{name}` must be one of {tuple(filter(None, accepted))}, got {value!r}")
    for name, count in (
        ("prompt_length", prompt_length),
        ("max_new_tokens", max_new_tokens),
        ("compress_every", compress_every),
    ):
        if count is not None and not (is_count(count) and count >= 1):
            raise ValueError(f"`{name}` must be a number of tokens, 1 or more, got {count!r}")
    if when_full == "double" and max_new_tokens is None:
        raise ValueError("`when_full` is for a cache of fixed size: give `max_new_tokens` too")
    if generated == "window" and later_turns == "dense":
        raise ValueError("`later_turns` must be 'segment' with generated='window', got 'dense'")
    if quantize is not None and later_turns == "segment":
        raise ValueError("`later_turns` must be 'dense' with `quantize`, which is for the first prompt; got 'segment'")
    if quantize is not None and (generated == "window" or max_new_tokens is not None):
        raise ValueError("`quantize` must not be given with `max_new_tokens` or generated='window': not supported")
    if generated == "window" and max_new_tokens is not None:
        raise ValueError("`max_new_tokens` must not be given with generated='window', whose size changes")
