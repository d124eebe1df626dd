"""What a user typed on the command line as the arguments of LookMCache: budget, policy, options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, get_args, get_type_hints

from lookm import published as _registers_the_policies  # noqa: F401
from lookm.budget import ACCEPTED, parse_budget
from lookm.policy import POLICIES, Policy, resolve_policy

WORDS = {"true": True, "false": False, "none": None}


def read_budget(text: str) -> float | int | str:
    """Digits are tokens, a number with a point is a fraction, percent and words likewise; the text itself for bytes.

    ValueError for what it would not take, and for a bare 1, which people type for one token and for everything.
    """
    if text.strip() == "1":
        raise ValueError(f"`budget` of 1 may mean one token ('1 token') or everything ('100%'); it is {ACCEPTED}")
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        parse_budget(value)
        return value
    budget = parse_budget(text)
    number = budget.tokens if budget.fraction is None else budget.fraction
    return text if number is None else number


def read_counts(text: str, name: str) -> list[int]:
    """Numbers of at least 1, separated by commas. ValueError, with the argument's name, for anything else."""
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(counts) < 1:
        raise ValueError(f"`{name}` must be whole numbers of at least 1, such as 4096,16384, got {text!r}")
    return counts


def read_policy(text: str, options: Sequence[str] = ()) -> Policy:
    """A registered name, or module:name of a Policy class or instance, importable from the current folder.

    options: NAME=VALUE of its fields. ValueError for anything that does not fit.
    """
    policy = _import(text) if ":" in text else resolve_policy(text, {})
    return resolve_policy(policy, dict(_option(policy, option) for option in options))


def _import(text: str) -> Policy:
    module, _, name = text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # the user's module may raise anything
        raise ValueError(f"`policy` {text!r} cannot be imported: {type(error).__name__}: {error}") from error
    if isinstance(found, type) and issubclass(found, Policy):
        # a registered class with the values that it was registered with
        return next((policy for policy in POLICIES.values() if type(policy) is found), None) or found()
    if not isinstance(found, Policy):
        raise ValueError(f"`policy` {text!r} must be a lookm.Policy, got {type(found).__name__}")
    return found


def _option(policy: Policy, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"`option` must be NAME=VALUE such as sinks=4, got {text!r}")
    hint = get_type_hints(type(policy)).get(name)
    kinds = get_args(hint) or (hint,)
    for kind in kinds:
        if kind in (bool, type(None)):
            word = WORDS.get(value.lower(), value)
            if isinstance(word, kind):
                return name, word
        elif kind in (int, float):
            try:
                return name, kind(value)
            except ValueError:
                continue
    # text, or what the policy will refuse by name
    return name, value
