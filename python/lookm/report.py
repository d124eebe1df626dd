"""What a cache holds: tokens seen, kept and evicted by layer and medium, and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import pad

from lookm.layer import LookMLayer
from lookm.modality import MEDIA


def media_masks(layer: LookMLayer) -> dict[str, Tensor]:
    """[B, seen] bool for each medium: its tokens among all that the layer has read; padding counts as text."""
    media = pad(layer.media, (0, layer.seen - layer.media.shape[1]))
    return {name: media == number for number, name in enumerate(MEDIA)}


@dataclass(frozen=True)
class LayerReport:
    """One layer. Tokens are summed over the rows of the batch, without padding; kept ones are averaged over heads.

    compressed: whether this layer's kind is compressed at all; one that is left as it is has no counts but these:
        places, bytes.
    rows: rows of the batch. places: token places that each row takes in memory, empty ones and padding included.
    seen_by, kept_by: tokens read, and those of them that are in the cache, by medium; the rest was evicted.
    later_by: those of them that were read after the last compression (generated tokens, later turns that stay dense);
        they are all kept and outside of the budget.
    merged: evicted tokens that live on in the votes of a kept pair, averaged over heads; 0 in a policy without votes.
    bytes: memory of the stored keys and values (or states), and of votes; bytes_full: what a cache that keeps
        everything would hold; later_bytes: how much of either is of the tokens of later_by.
    """

    layer: int
    compressed: bool
    rows: int
    places: int
    seen_by: Mapping[str, int]
    kept_by: Mapping[str, float]
    later_by: Mapping[str, int]
    bytes: int
    bytes_full: int
    later_bytes: int = 0
    merged: float = 0.0

    @property
    def seen(self) -> int:
        """Tokens read: kept + evicted."""
        return sum(self.seen_by.values())

    @property
    def kept(self) -> float:
        """Tokens that are in the cache."""
        return sum(self.kept_by.values())

    @property
    def evicted(self) -> float:
        """Tokens that are not."""
        return self.seen - self.kept

    @property
    def later(self) -> int:
        """Tokens read after the last compression, all kept."""
        return sum(self.later_by.values())

    @property
    def seen_text(self) -> int:
        """Text tokens read."""
        return self.seen_by["text"]

    @property
    def seen_image(self) -> int:
        """Image tokens read."""
        return self.seen_by["image"]

    @property
    def kept_text(self) -> float:
        """Text tokens in the cache."""
        return self.kept_by["text"]

    @property
    def kept_image(self) -> float:
        """Image tokens in the cache."""
        return self.kept_by["image"]

    def tokens(self) -> dict[str, float]:
        """The counts of tokens by name: seen, kept, evicted, later, and each of these by medium (seen_text, ...)."""
        whole = {"seen": self.seen, "kept": self.kept, "evicted": self.evicted, "merged": self.merged}
        whole["later"] = self.later
        parts = {"seen": self.seen_by, "kept": self.kept_by, "later": self.later_by}
        return whole | {f"{name}_{medium}": count for name, by in parts.items() for medium, count in by.items()}


@dataclass(frozen=True)
class Report:
    """All layers; str() is a line and a table, to_dict() plain numbers."""

    layers: list[LayerReport]

    @property
    def bytes(self) -> int:
        """Bytes of keys and values in all layers."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def bytes_full(self) -> int:
        """Bytes that a full cache would hold."""
        return sum(layer.bytes_full for layer in self.layers)

    @property
    def later_bytes(self) -> int:
        """Bytes of what was read after the last compression."""
        return sum(layer.later_bytes for layer in self.layers)

    def mean(self) -> dict[str, float]:
        """The counts of tokens (LayerReport.tokens) of a compressed layer, averaged over these layers."""
        each = [layer.tokens() for layer in self.layers if layer.compressed]
        return {name: sum(counts[name] for counts in each) / len(each) for name in each[0]}

    def to_dict(self) -> dict[str, Any]:
        """{"layers": [...], "mean": {...}, "bytes", "bytes_full", "later_bytes"}.

        A layer has the fields of LayerReport and its tokens by name; mean is of a compressed layer, bytes of all.
        """
        plain = ("layer", "compressed", "rows", "places", "bytes", "bytes_full", "later_bytes")
        return {
            "layers": [{name: getattr(layer, name) for name in plain} | layer.tokens() for layer in self.layers],
            "mean": self.mean(),
            "bytes": self.bytes,
            "bytes_full": self.bytes_full,
            "later_bytes": self.later_bytes,
        }

    def summary(self) -> str:
        """One line: what was read and compressed, what of it stays in each layer, and what was read since."""
        mean, whole = self.mean(), [layer for layer in self.layers if layer.compressed]
        if mean["seen"] == 0:
            return "nothing read yet"
        seen, kept = _of_prompt(mean, "seen"), _of_prompt(mean, "kept")
        by_medium = {medium: _of_prompt(mean, "seen", medium) for medium in MEDIA}
        media = ", ".join(f"{_tokens(count)} {medium}" for medium, count in by_medium.items() if count)
        rows = f" in {whole[0].rows} rows" if whole[0].rows > 1 else ""
        line = f"prompt: {_count(seen, 'token')}{rows} ({media}) -> {_tokens(kept)} kept in each of "
        line += f"{_count(len(whole), 'layer')} ({_share(kept, seen)})"
        if len(whole) < len(self.layers):
            line += f", {_count(len(self.layers) - len(whole), 'layer')} as they are"
        held, full = self.bytes - self.later_bytes, self.bytes_full - self.later_bytes
        line += f"; cache {format_bytes(held)} of {format_bytes(full)} ({_share(held, full)})"
        if mean["later"]:
            line += f"; since then {_count(mean['later'], 'token')}, {format_bytes(self.later_bytes)}"
        return line

    def __str__(self) -> str:
        """The summary, then what each layer holds of the prompt."""
        mean, whole = self.mean(), [layer for layer in self.layers if layer.compressed]
        if mean["seen"] == 0:
            return self.summary()
        shown = [medium for medium in MEDIA if _of_prompt(mean, "seen", medium)]
        # without a frame, to be read in a terminal of 50 columns
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for heading in ("layer", "tokens", *shown, "bytes", "share"):
            table.add_column(heading, justify="right", no_wrap=True)
        counts = [_of_prompt(mean, "seen", medium) for medium in ("", *shown)]
        full = sum(layer.bytes_full - layer.later_bytes for layer in whole) / len(whole)
        table.add_row("prompt", *map(_tokens, counts), format_bytes(full), "100.0 %")
        for layer in self.layers:
            held, full = layer.bytes - layer.later_bytes, layer.bytes_full - layer.later_bytes
            if layer.compressed:
                counts = [_of_prompt(layer.tokens(), "kept", medium) for medium in ("", *shown)]
                table.add_row(str(layer.layer), *map(_tokens, counts), format_bytes(held), _share(held, full))
            else:
                unknown = ["" for _ in shown]
                table.add_row(str(layer.layer), str(layer.places or ""), *unknown, format_bytes(held), "as is")
        text = StringIO()
        Console(file=text, width=200).print(table)
        return f"{self.summary()}\n{text.getvalue().rstrip()}"


def _of_prompt(counts: Mapping[str, float], name: str, medium: str = "") -> float:
    """What was read up to the last compression, out of LayerReport.tokens."""
    suffix = f"_{medium}" if medium else ""
    return counts[name + suffix] - counts["later" + suffix]


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole if whole else 100:.1f} %"


def _tokens(number: float) -> str:
    # a mean over heads: one digit is plenty, and no exponent for a long prompt
    return f"{number:.1f}".removesuffix(".0")


def _count(number: float, noun: str) -> str:
    return f"{_tokens(number)} {noun}{'' if number == 1 else 's'}"


def format_bytes(number: float) -> str:
    """A number of bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"


def layer_report(index: int, layer: Any) -> LayerReport:
    """The report of one layer of a LookMCache, whatever its kind."""
    nothing = dict.fromkeys(MEDIA, 0)
    if not isinstance(layer, LookMLayer):
        held = sum(tensor.nbytes for name, state in vars(layer).items() if name[0] != "_" for tensor in _tensors(state))
        keys = getattr(layer, "keys", None)
        rows, places = (0, 0) if keys is None else (keys.shape[0], keys.shape[-2])
        return LayerReport(index, False, rows, places, nothing, nothing, nothing, held, held)
    if not layer.is_initialized:
        return LayerReport(index, True, 0, 0, nothing, nothing, nothing, 0, 0)
    keys, values = layer.keys, layer.values
    positions = layer.kept_positions()
    rows, heads = positions.shape[:2]
    seen_by, kept_by, later_by = {}, {}, {}
    for medium, mask in media_masks(layer).items():
        held_here = layer.at(mask, positions)
        since = held_here & (positions >= (layer.compressed_at if layer.compressed else layer.seen))
        seen_by[medium] = int(mask.sum())
        kept_by[medium] = int(held_here.sum()) / heads
        later_by[medium] = int(since.sum()) // heads
    seen_by["text"] -= 0 if layer.padding is None else int(layer.padding.sum())
    votes = sum(tensor.nbytes for tensor in (layer.votes, layer.key_bias) if tensor is not None)
    column = (keys.nbytes + values.nbytes) // layer.stored
    return LayerReport(
        layer=index,
        compressed=True,
        rows=rows,
        places=layer.stored,
        seen_by=seen_by,
        kept_by=kept_by,
        later_by=later_by,
        bytes=layer.store.nbytes + votes,
        bytes_full=column * layer.seen,
        later_bytes=column * (layer.seen - layer.compressed_at if layer.compressed else 0),
        merged=0.0 if layer.votes is None else float((layer.votes - 1).clamp(min=0).sum()) / heads,
    )


def _tensors(state: Any) -> Iterator[Tensor]:
    """The tensors of an attribute of a layer: keys, or states by name or number."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        yield from (tensor for tensor in state.values() if isinstance(tensor, Tensor))
    elif isinstance(state, (list, tuple)):
        yield from (tensor for tensor in state if isinstance(tensor, Tensor))
