"""All models through all checks, each in a process of its own: a hang or a crash of one costs only its own row."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from every_model import checks, inputs, tiny
from every_model.specs import SPECS, Spec
from transformers.models.auto import modeling_auto

import lookm

LOOKM = Path(lookm.__file__).parent
SECONDS = 240  # for one model
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
    passed: names of the checks; without: those that do not apply, and why.
    """

    model_type: str
    model_class: str
    vision: bool
    status: str = "crashes"
    words: str = ""
    inputs: str = ""
    passed: list[str] = field(default_factory=list)
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
    row = Row(*entry)
    spec = SPECS.get(entry.model_type, Spec())
    try:
        torch.manual_seed(0)
        config = tiny.tiny_config(entry.model_type, spec.changes)
        model = tiny.tiny_model(entry.model_class, config)
    except Exception as error:
        row.status, row.words = "not in transformers", words(error)
        return row
    row.inputs = inputs.kind(model.config, spec)
    subject = checks.Subject(model, spec, inputs.draw(model.config, spec))
    run(subject, row)
    if row.status == "refused" and "image_mask" in row.words:
        told = Row(*entry, inputs=row.inputs)
        run(checks.Subject(model, spec, subject.rows, told=True), told)
        if told.status == "works":
            told.status, told.words = "works with image_mask=", row.words
        return told
    return row


def run(subject: checks.Subject, row: Row) -> None:
    """The checks, in order; the first ones decide whether the model works at all."""
    row.status = "works"
    for name, check in checks.CHECKS.items():
        try:
            check(subject)
        except checks.Wrong as error:
            row.status, row.words = "wrong", f"{name}: {error}"
            return
        except checks.TransformersAlone as error:
            row.without[name] = f"transformers: {one_line(str(error))}"
        except Exception as error:
            if not is_refusal(error):
                row.status, row.words = "crashes", f"{name}: {words(error)}{place(error)}"
                return
            row.without[name] = words(error)
            if not row.passed:
                row.status, row.words = "refused", words(error)
                return
        else:
            row.passed.append(name)
        if not row.passed:
            row.status, row.words = "not in transformers", row.without[name]
            return


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
    """What is committed of a sweep."""
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "models": [asdict(row) for row in sorted(rows, key=lambda row: (not row.vision, row.model_type))],
    }
