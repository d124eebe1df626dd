"""The demo's task: handwritten digits in coloured ink, named by letters, and questions about them.

A prompt shows up to eight pictures. Each is a scanned digit, inked in one of eight colours on a dim background, and
each has a name, one letter, written after it (like a caption) or before it (like "Image 3:"). A picture may be a clip:
two or three frames of the same scan, each placed and lit anew. Somewhere among the pictures stands a note of three
digits. In a `DETAIL` scene pictures are four times as large, and the digit is small and anywhere in them. With `o` for
a picture, a prompt in the two layouts reads

    after     <bos> o A o C note 3 1 4 o B Q C
    before    <bos> A o C o note 3 1 4 B o ; Q C

and the answers are short and end by themselves:

    Q C     ->  red 7 <eos>
    Q note  ->  3 1 4 <eos>

After an answer the next question simply follows, so one prompt serves a dialogue of many turns: exactly what a cache
that was compressed once has to survive. The colours in one prompt all differ; with repeated colours a model learns to
look the digit up by the colour it just said, and answers about another picture.

Everything is drawn from a `torch.Generator`, so equal seeds give equal prompts.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

Layout = Literal["after", "before"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 190, 50),
    "blue": (40, 60, 230),
    "yellow": (235, 220, 40),
    "purple": (150, 40, 190),
    "orange": (245, 140, 20),
    "white": (245, 245, 245),
    "cyan": (40, 215, 225),
}
LETTERS = tuple("ABCDEFGH")
DIGITS = tuple("0123456789")
VOCABULARY = ("<pad>", "<bos>", "<eos>", "<image>", "Q", "note", ";", ".", *COLOURS, *LETTERS, *DIGITS)
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}
PAD, BOS, EOS, IMAGE = (TOKEN[word] for word in ("<pad>", "<bos>", "<eos>", "<image>"))

MAX_IMAGES = len(COLOURS)
NOTE_LENGTH = 3
IMAGE_SIZE = 24
PATCH_SIZE = 4
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2


@dataclass(frozen=True)
class Scene:
    """What a picture looks like: its size, and how much of it the digit takes.

    tiles: it is tiles x tiles squares of 24 x 24 pixels, in reading order; the model sees each as an image of its own.
    height: of the digit, in pixels, least and most. It stands anywhere, but in one square.
    once: only one frame of a clip shows the digit; the others are blank.
    """

    tiles: int = 1
    height: tuple[float, float] = (15, 21)
    once: bool = False

    @property
    def squares(self) -> int:
        """Squares of a picture."""
        return self.tiles**2

    @property
    def size(self) -> int:
        """Pixels along one side of a picture."""
        return self.tiles * IMAGE_SIZE


CLOSE_UP = Scene()
DETAIL = Scene(tiles=2, height=(10, 12), once=True)


@dataclass(frozen=True)
class Scans:
    """Scanned digits: `pixels` [n, 8, 8] float32 in 0..1 (1 is ink), `labels` [n] int64."""

    pixels: Tensor
    labels: Tensor

    @classmethod
    def from_arrays(cls, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]) -> Scans:
        """From the scans' own 17 grey levels, 0..16."""
        return cls(torch.from_numpy(images).float() / 16, torch.from_numpy(labels).long())

    def __len__(self) -> int:
        return len(self.labels)


def held_out_scans() -> Scans:
    """The scans shipped with the package; the demo model never saw them (see DIGITS.md)."""
    resource = importlib.resources.files(__package__).joinpath("digits.npz")
    with resource.open("rb") as file, np.load(file) as data:
        return Scans.from_arrays(data["images"], data["labels"])


@dataclass(frozen=True)
class Facts:
    """What is true in a batch of prompts. `scan`, `colour`, `digit`, `letter` [B, K]; `note` [B, 3].

    All but `scan` (a row of the `Scans`) count from zero within their own kind: colour 0 is red, letter 0 is A.
    The note stands after picture number `note_place`, the same in every row.
    """

    scan: Tensor
    colour: Tensor
    digit: Tensor
    letter: Tensor
    note: Tensor
    note_place: int


class Turn(NamedTuple):
    """One question and its answer as token ids, [B, 2] and [B, 3 or 4]; the answer ends with `<eos>`."""

    question: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts, without a question. `input_ids` [B, N]; `images` [B, K * frames * squares, 24, 24, 3] uint8.

    A square of a picture is an image as the model knows it.
    """

    facts: Facts
    layout: Layout
    frames: int
    input_ids: Tensor
    images: Tensor

    @property
    def pixel_values(self) -> Tensor:
        """What the model's image processor makes of `images`: [B * images, 3, 24, 24] float32 in -1..1."""
        return normalised(self.images.flatten(0, 1))

    def text(self, row: int) -> str:
        """Row `row` as the processor wants it: words with one `<image>` per square of a frame."""
        return text_of(self.input_ids[row])

    def pictures(self, row: int) -> list[npt.NDArray[np.uint8]]:
        """The images of row `row` as arrays [24, 24, 3], ready for `PIL.Image.fromarray`."""
        return list(self.images[row].numpy())


def draw_prompts(
    batch: int,
    images: int,
    layout: Layout,
    frames: int,
    scans: Scans,
    generator: torch.Generator,
    *,
    jitter: float = 1.0,
    scene: Scene = CLOSE_UP,
) -> Prompt:
    """Draw a batch of prompts over `images` pictures of `frames` frames each; `jitter` and `scene` as in `render`."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    facts = draw_facts(batch, images, scans, generator)
    runs = torch.full((batch, images, frames * scene.squares * IMAGE_TOKENS), IMAGE)
    scan, colour = (fact.repeat_interleave(frames, dim=1).flatten() for fact in (facts.scan, facts.colour))
    shown = None
    if scene.once:
        shown = functional.one_hot(torch.randint(frames, (batch, images), generator=generator), frames).flatten()
    pictures = render(scans.pixels[scan], colour, generator, jitter=jitter, scene=scene, shown=shown)
    squares = cut(pictures, scene)
    return Prompt(facts, layout, frames, lay_out(facts, layout, runs), squares.view(batch, -1, *squares.shape[1:]))


def draw_facts(batch: int, images: int, scans: Scans, generator: torch.Generator) -> Facts:
    """Draw scans, distinct colours and letters, and a note for `batch` prompts of `images` pictures."""
    if not 1 <= images <= MAX_IMAGES:
        raise ValueError(f"images must be between 1 and {MAX_IMAGES}, got {images}")

    def shuffled(size: int) -> Tensor:
        return torch.rand(batch, size, generator=generator).argsort(dim=1)[:, :images]

    scan = torch.randint(len(scans), (batch, images), generator=generator)
    return Facts(
        scan=scan,
        colour=shuffled(len(COLOURS)),
        digit=scans.labels[scan],
        letter=shuffled(len(LETTERS)),
        note=torch.randint(len(DIGITS), (batch, NOTE_LENGTH), generator=generator),
        note_place=int(torch.randint(images, (), generator=generator)),
    )


def lay_out(facts: Facts, layout: Layout, runs: Tensor) -> Tensor:
    """Token ids [B, N] of the prompt in which picture k is the token run `runs[:, k]` ([B, K, R])."""
    batch, images = facts.letter.shape
    parts = [_column("<bos>", batch)]
    for k in range(images):
        name = facts.letter[:, k : k + 1] + TOKEN["A"]
        parts += [runs[:, k], name] if layout == "after" else [name, runs[:, k]]
        if k == facts.note_place:
            parts += [_column("note", batch), facts.note + TOKEN["0"]]
    if layout == "before":
        parts.append(_column(";", batch))
    return torch.cat(parts, dim=1)


def ask_picture(facts: Facts, index: Tensor) -> Turn:
    """Ask row b about its picture number `index[b]` ([B] int64): "Q C -> red 7 <eos>"."""
    batch = len(index)

    def word(fact: Tensor, first: str) -> Tensor:
        return fact.gather(1, index[:, None]) + TOKEN[first]

    question = torch.cat([_column("Q", batch), word(facts.letter, "A")], dim=1)
    answer = [word(facts.colour, "red"), word(facts.digit, "0"), _column("<eos>", batch)]
    return Turn(question, torch.cat(answer, dim=1))


def ask_note(facts: Facts) -> Turn:
    """Ask every row for its note: "Q note -> 3 1 4 <eos>"."""
    batch = len(facts.note)
    question = torch.cat([_column("Q", batch), _column("note", batch)], dim=1)
    return Turn(question, torch.cat([facts.note + TOKEN["0"], _column("<eos>", batch)], dim=1))


def text_of(ids: Tensor) -> str:
    """The words of one row of token ids [N], with one `<image>` for each picture's run of `IMAGE_TOKENS`."""
    words, seen = [], 0
    for token in ids.tolist():
        if token == IMAGE:
            seen += 1
            if seen % IMAGE_TOKENS:
                continue
        words.append(VOCABULARY[token])
    return " ".join(words)


def render(
    scans: Tensor,
    colour: Tensor,
    generator: torch.Generator,
    *,
    jitter: float = 1.0,
    scene: Scene = CLOSE_UP,
    shown: Tensor | None = None,
) -> Tensor:
    """Ink `scans` [n, 8, 8] in `colour` [n] on dim, uneven, noisy backgrounds: uint8 [n, size, size, 3].

    Each digit has its own height (see `Scene`), place, slant, stroke weight and light. `jitter` widens or narrows the
    turning, stretching and shearing; training uses more than the demo. Where `shown` [n] is 0 there is no digit.
    """
    return paint(place(len(scans), generator, jitter, scene), scans, colour, generator, shown=shown)


class Placed(NamedTuple):
    """Where digits are: a sampling grid [n, size, size, 2] for `grid_sample`; their middles [n, 2] (x, y) in pixels."""

    grid: Tensor
    middle: Tensor


def place(n: int, generator: torch.Generator, jitter: float, scene: Scene) -> Placed:
    """Draw where each canvas pixel looks into its scan."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    height = uniform(*scene.height)
    zoom = IMAGE_SIZE / height * scene.tiles
    angle, shear, stretch = (jitter * uniform(-width, width) for width in (0.2, 0.15, 0.1))
    cos, sin = angle.cos(), angle.sin()
    # Rows of zoom * stretch * shear * rotation; the shift moves the digit within the room its height leaves.
    x_row = torch.stack([cos + shear * sin, shear * cos - sin], dim=1) * (zoom * (1 + stretch))[:, None]
    y_row = torch.stack([sin, cos], dim=1) * zoom[:, None]
    linear = torch.stack([x_row, y_row], dim=1)
    room = (1 - height / IMAGE_SIZE)[:, None] / scene.tiles
    shift = torch.stack([uniform(-1, 1), uniform(-1, 1)], dim=1) * room
    if scene.tiles > 1:
        shift += (2 * torch.randint(scene.tiles, (n, 2), generator=generator) + 1) / scene.tiles - 1
    affine = torch.cat([linear, -linear @ shift[:, :, None]], dim=2)
    grid = functional.affine_grid(affine, [n, 1, scene.size, scene.size], align_corners=False)
    return Placed(grid, (shift + 1) / 2 * scene.size)


def paint(
    placed: Placed, scans: Tensor, colour: Tensor, generator: torch.Generator, *, shown: Tensor | None = None
) -> Tensor:
    """The pictures of `render`, once it is drawn where their digits stand."""
    n, size = placed.grid.shape[:2]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    cover = functional.grid_sample(scans[:, None], placed.grid, align_corners=False)
    cover = (cover * uniform(1.0, 1.5, 1, 1, 1)).clamp(max=1)
    if shown is not None:
        cover = cover * shown.view(n, 1, 1, 1)
    ink = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[colour] / 255
    ink = (ink * uniform(0.85, 1.0, 1))[:, :, None, None]
    ramp = torch.linspace(-1, 1, size)
    slope = uniform(-0.06, 0.06, 2, 1, 1, 1)
    paper = uniform(0.05, 0.3, 3, 1, 1) + slope[:, 0] * ramp + slope[:, 1] * ramp[:, None]
    noise = torch.randn(n, 3, size, size, generator=generator) * 0.03
    picture = paper * (1 - cover) + ink * cover + noise
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def cut(pictures: Tensor, scene: Scene) -> Tensor:
    """Pictures [n, size, size, 3] as their squares [n * squares, 24, 24, 3], in reading order."""
    sides = pictures.view(-1, scene.tiles, IMAGE_SIZE, scene.tiles, IMAGE_SIZE, 3)
    return sides.transpose(2, 3).flatten(0, 2)


def normalised(images: Tensor) -> Tensor:
    """uint8 [n, 24, 24, 3] to float32 [n, 3, 24, 24] in -1..1, as a CLIP image processor of mean and std 0.5 does."""
    return (images.permute(0, 3, 1, 2).float() * (1 / 255) - 0.5) / 0.5


def _column(word: str, batch: int) -> Tensor:
    return torch.full((batch, 1), TOKEN[word])
