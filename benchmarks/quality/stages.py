"""The stages of the training. Each depends only on the checkpoint before it, the seed and its own settings."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from sequences import IGNORED, JITTER, Sequence, picture_sequence, recall_sequence, text_sequence
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from lookm.demo.task import (
    CLOSE_UP,
    COLOURS,
    DETAIL,
    DIGITS,
    IMAGE_SIZE,
    LAYOUTS,
    MAX_IMAGES,
    PATCH_SIZE,
    TOKEN,
    Layout,
    Scans,
    Scene,
    normalised,
    paint,
    place,
    render,
)

Log = Callable[[dict[str, object]], None]
REPORT_SECONDS = 20


@dataclass(frozen=True)
class Stage:
    """Language-model training at `learning_rate` until all kinds of answers reach `goal`, then `decay_steps` to zero.

    It begins with at most `first_images` pictures a prompt and adds one whenever all kinds reach `promotion`.
    `text` is the share of batches without pictures; the tower learns at `tower_rate` times the rate of the rest. At 0
    tower and projector stay as they are.
    """

    name: str
    goal: float
    max_steps: int
    decay_steps: int
    learning_rate: float
    text: float = 0.0
    recall: float = 0.0
    frames: tuple[int, ...] = (1,)
    batch: int = 16
    text_batch: int = 64
    warmup: int = 50
    first_images: int = MAX_IMAGES
    spread: int = 5
    promotion: float = 0.85
    tower_rate: float = 0.2
    scene: Scene = CLOSE_UP


TEXT = Stage("text", 0.97, 6000, 400, 2e-3, text=1.0, recall=0.5, warmup=150, first_images=3, spread=2)
JOINT = Stage("joint", 0.95, 400, 100, 1.5e-3, text=0.1)
LONG = Stage("long", 0.97, 300, 150, 7e-4, text=0.05, frames=(1, 2, 3), batch=8)
# From here on the tower stays: trained with the rest, it could come to say in every patch what stands in one.
SMALL = Stage(
    "small", 0.93, 500, 50, 1.5e-3, text=0.05, frames=(1, 1, 2), tower_rate=0.0, scene=replace(DETAIL, tiles=1)
)
SEEK = Stage("seek", 0.95, 300, 100, 1e-3, text=0.05, batch=8, tower_rate=0.0, scene=DETAIL)
FAR = Stage("far", 0.97, 300, 150, 1e-3, text=0.05, frames=(1, 1, 1, 2), batch=8, tower_rate=0.0, scene=DETAIL)
ALBUM = Stage("album", 0.97, 150, 100, 7e-4, text=0.05, frames=(1, 2, 2), batch=8, tower_rate=0.0, scene=DETAIL)
SETTLE = Stage("settle", 0.97, 120, 200, 7e-4, text=0.05, frames=(1, 1, 2), batch=8, tower_rate=0.0, scene=DETAIL)


class Accuracy:
    """Running exact match for each (layout, kind of answer), measured on the training batches as they come."""

    def __init__(self) -> None:
        self.values = {f"{layout} {kind}": 0.0 for layout in LAYOUTS for kind in ("picture", "note")}

    def add(self, kind: str, value: float) -> None:
        self.values[kind] = 0.95 * self.values.get(kind, 0.0) + 0.05 * value

    def of(self, layout: Layout) -> float:
        return min(self.values[f"{layout} {kind}"] for kind in ("picture", "note"))

    def worst(self) -> float:
        return min(self.of(layout) for layout in LAYOUTS)

    def harder_layout(self, order: random.Random) -> Layout:
        """Draw a layout, the less accurate one more often: it is the second to be found, and needs the practice."""
        missing = [1.1 - self.of(layout) for layout in LAYOUTS]
        return order.choices(LAYOUTS, missing)[0]

    def rounded(self) -> dict[str, float]:
        return {kind: round(value, 3) for kind, value in self.values.items()}


def train_language(model: LlavaForConditionalGeneration, stage: Stage, scans: Scans, seed: int, log: Log) -> None:
    """Run one `Stage` on `model` in place."""
    generator, order = torch.Generator().manual_seed(seed), random.Random(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage.tower_rate > 0 or not _is_sight(name))
    optimizer = _optimizer(model, tower_rate=stage.tower_rate)
    accuracy, images, decay_from, start, reported = Accuracy(), stage.first_images, stage.max_steps, time.time(), 0.0
    step = 0
    while step < decay_from + stage.decay_steps:
        factor = min(1.0, (step + 1) / stage.warmup, 1 - (step - decay_from) / stage.decay_steps)
        _set_rate(optimizer, stage.learning_rate * factor)
        is_text = order.random() < stage.text
        layout = accuracy.harder_layout(order)
        if order.random() < stage.recall:
            sequence = recall_sequence(stage.text_batch, order.randint(2, 8), layout, generator, questions=8)
        else:
            sequence = _draw(stage, is_text, images, layout, scans, generator, order)
        loss, correct = _learn(model, sequence, optimizer)
        step += 1
        if not is_text or stage.text == 1:
            for kind, first, last in sequence.answers:
                if kind != "later":
                    accuracy.add(f"{layout} {kind}", correct[:, first - 1 : last - 1].all(dim=1).float().mean().item())
        if images < MAX_IMAGES and accuracy.worst() > stage.promotion:
            images += 1
            accuracy.values = {key: 0.8 * value for key, value in accuracy.values.items()}
        elif images == MAX_IMAGES and step < decay_from and accuracy.worst() > stage.goal:
            decay_from = step
        now = time.time() - start
        if now - reported > REPORT_SECONDS or step == decay_from + stage.decay_steps:
            reported = now
            entry: dict[str, object] = {"stage": stage.name, "step": step, "seconds": round(now, 1), "images": images}
            log(entry | {"loss": round(loss, 4), "rate": stage.learning_rate * factor} | accuracy.rounded())


def align_tower(
    model: LlavaForConditionalGeneration, scans: Scans, seed: int, log: Log, *, steps: int = 3000, batch: int = 128
) -> None:
    """Teach tower and projector to say, averaged over a picture's patches, the words for its colour and its digit.

    The words are the embeddings the language model has already learnt, which stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_sight(name))
    rate = 3e-3
    optimizer = _optimizer(model)
    words = functional.normalize(model.get_input_embeddings().weight.detach(), dim=-1) * 2
    colours, digits = words[TOKEN["red"] :][: len(COLOURS)], words[TOKEN["0"] :][: len(DIGITS)]
    right, start, reported = torch.zeros(2), time.time(), 0.0
    for step in range(1, steps + 1):
        _set_rate(optimizer, rate * min(1.0, step / 100, 1.02 - step / steps))
        scan = torch.randint(len(scans), (batch,), generator=generator)
        colour, digit = torch.randint(len(COLOURS), (batch,), generator=generator), scans.labels[scan]
        features = picture_features(model, normalised(render(scans.pixels[scan], colour, generator, jitter=JITTER)))
        said = functional.rms_norm(features, features.shape[-1:]).mean(dim=1)
        colour_logits, digit_logits = said @ colours.T, said @ digits.T
        loss = functional.cross_entropy(colour_logits, colour) + functional.cross_entropy(digit_logits, digit)
        _step(model, loss, optimizer)
        hits = torch.stack([colour_logits.argmax(1) == colour, digit_logits.argmax(1) == digit]).float().mean(dim=1)
        right = 0.98 * right + 0.02 * hits
        now = time.time() - start
        if now - reported > REPORT_SECONDS or step == steps:
            reported = now
            colour_right, digit_right = (round(value, 3) for value in right.tolist())
            entry: dict[str, object] = {"stage": "align", "step": step, "seconds": round(now, 1)}
            log(entry | {"loss": round(loss.item(), 4), "colour": colour_right, "digit": digit_right})


def align_patches(
    model: LlavaForConditionalGeneration,
    scans: Scans,
    seed: int,
    log: Log,
    *,
    steps: int = 4000,
    batch: int = 128,
    rate: float = 2e-3,
) -> None:
    """Teach tower and projector to read small digits in one square, and to say so only where they stand.

    The patches whose middle is within a patch's width of the digit's (three or four) must be the words for colour and
    digit; all others must be the word ".", which says nothing, as in the task in words. Every fifth square is blank.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_sight(name))
    optimizer = _optimizer(model)
    embedding = model.get_input_embeddings().weight.detach()
    dot = embedding[TOKEN["."]]
    words = functional.normalize(embedding, dim=-1) * 2
    colours, digits = words[TOKEN["red"] :][: len(COLOURS)], words[TOKEN["0"] :][: len(DIGITS)]
    side = (torch.arange(IMAGE_SIZE // PATCH_SIZE) + 0.5) * PATCH_SIZE
    patches = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1).flatten(0, 1)
    square = replace(DETAIL, tiles=1)
    shown = (torch.arange(batch) % 5 > 0).long()
    right, start, reported = torch.zeros(2), time.time(), 0.0
    for step in range(1, steps + 1):
        _set_rate(optimizer, rate * min(1.0, step / 100, 1.02 - step / steps))
        scan = torch.randint(len(scans), (batch,), generator=generator)
        colour, digit = torch.randint(len(COLOURS), (batch,), generator=generator), scans.labels[scan]
        placed = place(batch, generator, JITTER, square)
        near = ((patches - placed.middle[:, None]).norm(dim=-1) < PATCH_SIZE) & (shown[:, None] > 0)
        pictures = paint(placed, scans.pixels[scan], colour, generator, shown=shown)
        features = picture_features(model, normalised(pictures))
        said, owner = functional.rms_norm(features[near], features.shape[-1:]), near.nonzero()[:, 0]
        colour_logits, digit_logits = said @ colours.T, said @ digits.T
        loss = functional.cross_entropy(colour_logits, colour[owner])
        loss += functional.cross_entropy(digit_logits, digit[owner])
        loss += (features[~near] - dot).square().mean() / dot.square().mean()
        _step(model, loss, optimizer)
        hits = torch.stack([colour_logits.argmax(1) == colour[owner], digit_logits.argmax(1) == digit[owner]])
        right = 0.98 * right + 0.02 * hits.float().mean(dim=1)
        now = time.time() - start
        if now - reported > REPORT_SECONDS or step == steps:
            reported = now
            colour_right, digit_right = (round(value, 3) for value in right.tolist())
            entry: dict[str, object] = {"stage": "patches", "step": step, "seconds": round(now, 1)}
            log(entry | {"loss": round(loss.item(), 4), "colour": colour_right, "digit": digit_right})


def picture_features(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """The projected patch features [n, 36, width] of n pictures."""
    output = model.model.get_image_features(pixel_values=pixel_values)
    features = getattr(output, "pooler_output", output)
    return torch.stack(list(features))


def _draw(
    stage: Stage,
    is_text: bool,
    most: int,
    layout: Layout,
    scans: Scans,
    generator: torch.Generator,
    order: random.Random,
) -> Sequence:
    images = order.randint(max(2, most - stage.spread), most)
    if is_text:
        level = most - TEXT.first_images
        run = order.randint(2, 2 + 2 * level)
        batch = stage.text_batch if stage.text == 1 else 2 * stage.batch
        return text_sequence(batch, images, layout, run, scans, generator, order, questions=6, adjacent=level == 0)
    frames = order.choice(stage.frames)
    batch = stage.batch * (2 if images <= 4 else 1)
    return picture_sequence(batch, images, layout, frames, scans, generator, order, scene=stage.scene)


def _is_sight(name: str) -> bool:
    """Whether a parameter belongs to the tower or the projector."""
    return "vision_tower" in name or "projector" in name


def _learn(
    model: LlavaForConditionalGeneration, sequence: Sequence, optimizer: torch.optim.Optimizer
) -> tuple[float, Tensor]:
    """One optimizer step; the loss, and which labels [B, N - 1] were predicted right (True where there is no label)."""
    logits = model(input_ids=sequence.input_ids, pixel_values=sequence.pixel_values, use_cache=False).logits[:, :-1]
    labels = sequence.labels[:, 1:]
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    _step(model, loss, optimizer)
    return loss.item(), (logits.detach().argmax(dim=-1) == labels) | (labels == IGNORED)


def _step(model: LlavaForConditionalGeneration, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _optimizer(model: LlavaForConditionalGeneration, tower_rate: float = 1.0) -> torch.optim.Optimizer:
    """AdamW over what requires a gradient; vectors do not decay, the tower learns at `tower_rate` times the rate."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["vision_tower" in name, parameter.ndim > 1].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": 0.05 * is_matrix, "share": tower_rate if is_tower else 1.0}
            for (is_tower, is_matrix), parameters in groups.items()
        ],
        betas=(0.9, 0.98),
    )


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]
