"""What every test bed offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import lookm

Split = Literal["tune", "final"]
FULL = lookm.POLICIES["full"]


class Bed(Protocol):
    """A task, cut into units that are independent of each other, so that intervals can be had by drawing units.

    The units of `tune` are for choosing a policy; those of `final` are looked at once, in the end.
    """

    name: str

    def units(self, split: Split) -> Sequence[int]:
        """The ids of a split's units; no id is in both splits."""

    def measure(self, policy: lookm.Policy, budget: float | int, split: Split, **options: Any) -> list[dict[str, Any]]:
        """{"unit": id, name of a metric: value, ...} for every unit, in the order of `units`.

        The policy `FULL` at 1.0 is what others are compared with. options: of the LookMCache besides.
        """
