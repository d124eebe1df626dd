"""All models through all checks, each in a process of its own: a hang or a crash of one costs only its own row."""

from __future__ import annotations

import json
import multiprocessing
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.auto import modeling_auto

import lookm
from every_model import checks, inputs, tiny
from every_model.specs import SPECS, Spec
from lookm import LookMCache

RESULTS = Path(__file__).parent.parent / "results" / "families"
LOOKM = Path(lookm.__file__).parent
SECONDS = 240  # for one model
ABSENT = "not in transformers"
REQUIRED = ("whole budget", "small budget")
BROKEN = ("wrong", "crashes")  # what fails a run


class Entry(NamedTuple):
    """A model type and the class a mapping gives it; vision: it is among those that read images."""

    model_type: str
    model_class: str
    vision: bool


@dataclass
class Row:
    """What became of one model.

    status: "works", "works with image_mask=", "refused", "not in transformers" (transformers itself cannot build it, or
    run it with a DynamicCache), "wrong" or "crashes"; words: why. inputs: "pixels", "placeholders" or "text".
    without: the checks that a model that works did not pass, because transformers itself does not or lookm refuses.
    """

    model_type: str
    model_class: str
    vision: bool
    status: str = "crashes"
    words: str = ""
    inputs: str = ""
    without: dict[str, str] = field(default_factory=dict)


def entries() -> list[Entry]:
    """Every entry of the mappings of models that read images (or other media) and of the causal language models."""
    vision = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    vision |= getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})
    text = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return [Entry(*pair, True) for pair in sorted(vision.items())] + [
        Entry(*pair, False) for pair in sorted(text.items()) if vision.get(pair[0]) != pair[1]
    ]


def examine(entry: Entry) -> Row:
    """Build the model and run every check on it."""
    row, spec = Row(*entry), SPECS.get(entry.model_type, Spec())
    spec = spec if entry.vision else replace(spec, image=None, placeholder=None)
    try:
        config = tiny.tiny_config(entry.model_type, entry.model_class, spec.changes)
        model = tiny.tiny_model(entry.model_class, config)
    except Exception as error:
        row.status, row.words = ABSENT, words(error)
        return row
    model = model if spec.part is None else getattr(model, spec.part)
    subject = checks.Subject(model, spec, inputs.draw(model.config, spec))
    row.inputs = inputs.kind(model.config, spec)
    try:
        LookMCache(model, checks.BUDGET)
    except Exception as error:
        row.status, row.words = verdict(error)
        if row.status != "refused":
            row.status, row.words = without_lookm(subject) or (row.status, row.words)
        return row
    run(subject, row)
    if row.status == "refused" and "image_mask" in row.words:
        told = Row(*entry, inputs=row.inputs)
        run(replace(subject, told=True), told)
        if told.status == "works":
            told.status, told.words = "works with image_mask=", row.words
        return told
    return row


def without_lookm(subject: checks.Subject) -> tuple[str, str] | None:
    """The verdict on a configuration of which transformers itself can make no DynamicCache."""
    try:
        with checks.transformers_alone():
            subject.plain()
    except checks.TransformersError as error:
        return verdict(error)
    return None


def run(subject: checks.Subject, row: Row) -> None:
    """The checks, in order; those of REQUIRED decide whether the model works at all."""
    row.status = "works"
    for name, check in checks.CHECKS.items():
        try:
            check(subject)
        except Exception as error:
            status, why = verdict(error)
            if status in BROKEN or name in REQUIRED:
                row.status, row.words = status, why if status not in BROKEN else f"{name}: {why}"
                if status == "refused":
                    _ensure_in_time(subject, row)
                return
            row.without[name] = f"{status}: {why}"


def _ensure_in_time(subject: checks.Subject, row: Row) -> None:
    try:
        checks.refused_at_once(subject)
    except Exception as error:
        status, why = verdict(error)
        row.status, row.words = status, f"{why}: {row.words}"


def verdict(error: Exception) -> tuple[str, str]:
    """Status and words of what a check raised."""
    if isinstance(error, checks.WrongError):
        return "wrong", str(error)
    if isinstance(error, checks.TransformersError):
        return ABSENT, one_line(str(error))
    return ("refused", words(error)) if is_refusal(error) else ("crashes", words(error) + place(error))


def is_refusal(error: Exception) -> bool:
    """Whether lookm raised it, in words for its user."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, NotImplementedError | ValueError) and LOOKM in Path(last).parents


def words(error: Exception) -> str:
    """Kind and message in one line."""
    return one_line(f"{type(error).__name__}: {error}")


def one_line(message: str) -> str:
    """Without line breaks, and not endless."""
    return " ".join(message.split())[:400]


def place(error: Exception) -> str:
    """Where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({Path(last.filename).name}:{last.lineno})"


def sweep(chosen: Sequence[Entry], workers: int = 2) -> Iterator[Row]:
    """A row each, as they are done."""
    context = multiprocessing.get_context("fork")  # transformers is imported once
    waiting, running = list(reversed(chosen)), {}
    while waiting or running:
        while waiting and len(running) < workers:
            entry = waiting.pop()
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_report, args=(entry, send))
            process.start()
            send.close()
            running[receive] = (entry, process, time.monotonic() + SECONDS)
        for receive in wait(list(running), timeout=1):
            entry, process, _ = running.pop(receive)
            try:
                row = receive.recv()
            except EOFError:
                process.join()
                row = Row(*entry, words=f"the process ended with exit code {process.exitcode}")
            process.join()
            yield row
        for receive, (entry, process, end) in list(running.items()):
            if time.monotonic() > end:
                del running[receive]
                process.kill()
                process.join()
                yield Row(*entry, words=f"no end after {SECONDS} s")


def _report(entry: Entry, send: Any) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    send.send(examine(entry))


def record(rows: Sequence[Row]) -> dict[str, Any]:
    """What is committed of a sweep: of a row, what says something."""
    ordered = sorted(rows, key=lambda row: (not row.vision, row.model_type))
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
        "checks": {name: (check.__doc__ or "").strip() for name, check in checks.CHECKS.items()},
        "models": [
            {name: value for name, value in asdict(row).items() if value not in ("", [], {})} for row in ordered
        ],
    }


def write(path: Path, recorded: dict[str, Any]) -> None:
    """A line a model."""
    models = ",\n".join("  " + json.dumps(model) for model in recorded["models"])
    rest = json.dumps({name: value for name, value in recorded.items() if name != "models"}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rest.removesuffix("\n}") + f',\n "models": [\n{models}\n ]\n}}\n')
