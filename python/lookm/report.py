"""What a cache holds: tokens seen, kept and evicted by layer, split by text and image, and bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

from lookm.layer import LookMLayer


@dataclass(frozen=True)
class LayerReport:
    """One layer. Tokens are summed over the rows of the batch, without padding; kept ones are averaged over heads.

    seen = kept + evicted; each is text plus image. bytes: memory of the stored keys and values; bytes_full: what a
    cache that keeps everything would hold. compressed: whether this layer's kind is compressed at all.
    """

    layer: int
    compressed: bool
    seen_text: int
    seen_image: int
    kept_text: float
    kept_image: float
    bytes: int
    bytes_full: int

    @property
    def seen(self) -> int:
        """Tokens seen."""
        return self.seen_text + self.seen_image

    @property
    def kept(self) -> float:
        """Tokens that are in the cache."""
        return self.kept_text + self.kept_image

    @property
    def evicted(self) -> float:
        """Tokens that are not."""
        return self.seen - self.kept


@dataclass(frozen=True)
class Report:
    """All layers; str() is a table, to_dict() plain numbers."""

    layers: list[LayerReport]

    @property
    def bytes(self) -> int:
        """Bytes of keys and values in all layers."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def bytes_full(self) -> int:
        """Bytes that a full cache would hold."""
        return sum(layer.bytes_full for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """{"layers": [...], "total": {...}}; tokens are totals of the compressed layers, bytes of all layers."""
        compressed = [layer for layer in self.layers if layer.compressed]
        names = ("seen", "kept", "evicted", "seen_text", "seen_image", "kept_text", "kept_image")
        total: dict[str, float] = {name: sum(getattr(layer, name) for layer in compressed) for name in names}
        return {
            "layers": [
                {**asdict(layer), "seen": layer.seen, "kept": layer.kept, "evicted": layer.evicted}
                for layer in self.layers
            ],
            "total": {**total, "bytes": self.bytes, "bytes_full": self.bytes_full},
        }

    def __str__(self) -> str:
        numbers = self.to_dict()
        table = Table(title="tokens (text + image) and bytes, by layer")
        for heading in ("layer", "seen", "kept", "evicted", "bytes", "full cache"):
            table.add_column(heading, justify="right")
        for row in numbers["layers"]:
            name = f"{row['layer']}" if row["compressed"] else f"{row['layer']} (as is)"
            table.add_row(name, *_cells(row))
        table.add_section()
        table.add_row("total", *_cells(numbers["total"]))
        text = StringIO()
        # as wide as the numbers of a long prompt: a cell on two lines reads badly
        Console(file=text, width=200).print(table)
        return text.getvalue().rstrip()


def _cells(row: dict[str, Any]) -> list[str]:
    evicted = (row["seen_text"] - row["kept_text"], row["seen_image"] - row["kept_image"])
    share = row["bytes"] / row["bytes_full"] if row["bytes_full"] else 1.0
    return [
        f"{row['seen']} ({row['seen_text']} + {row['seen_image']})",
        f"{_tokens(row['kept'])} ({_tokens(row['kept_text'])} + {_tokens(row['kept_image'])})",
        f"{_tokens(row['evicted'])} ({_tokens(evicted[0])} + {_tokens(evicted[1])})",
        f"{format_bytes(row['bytes'])} ({100 * share:.1f} %)",
        format_bytes(row["bytes_full"]),
    ]


def _tokens(number: float) -> str:
    # a mean over heads: one digit is plenty, and no exponent for a long prompt
    return f"{number:.1f}".removesuffix(".0")


def format_bytes(number: float) -> str:
    """A number of bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"


def layer_report(index: int, layer: Any) -> LayerReport:
    """The report of one layer of a LookMCache, whatever its kind."""
    if not isinstance(layer, LookMLayer):
        tensors = [getattr(layer, name, None) for name in ("keys", "values")]
        held = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return LayerReport(index, False, 0, 0, 0, 0, held, held)
    if not layer.is_initialized:
        return LayerReport(index, True, 0, 0, 0, 0, 0, 0)
    batch, heads = layer.keys.shape[:2]
    padding = 0 if layer.padding is None else int(layer.padding.sum())
    seen_image = 0 if layer.image is None else int(layer.image.sum())
    positions = layer.kept_positions()
    kept = int((positions >= 0).sum()) / heads
    kept_image = 0.0
    if layer.image is not None and layer.image.shape[1]:
        known = (positions >= 0) & (positions < layer.image.shape[1])
        place = positions.clamp(0, layer.image.shape[1] - 1).long()
        images = layer.image[:, None].expand(-1, heads, -1).gather(2, place)
        kept_image = int((images & known).sum()) / heads
    held = layer.keys.nbytes + layer.values.nbytes
    return LayerReport(
        layer=index,
        compressed=True,
        seen_text=batch * layer.seen - padding - seen_image,
        seen_image=seen_image,
        kept_text=kept - kept_image,
        kept_image=kept_image,
        bytes=held,
        bytes_full=held // layer.stored * layer.seen,
    )
