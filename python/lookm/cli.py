"""The `lookm` command: arguments alone; what needs torch is imported when a command runs."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lookm.errors import check_torchvision, reason
from lookm.parallel import leave, one_process, processes, rank, shared_seed

if TYPE_CHECKING:
    from PIL.Image import Image

    from lookm.cache import LookMCache
    from lookm.generate import Checkpoint, Sampling
    from lookm.media import Video

app = typer.Typer(
    help="Long multi-image prompts on 5-20 % of the KV cache (LOOK-M).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
BudgetOption = Annotated[
    str, typer.Option(help="What stays of the prompt: 0.2 or 20%, 500 or '500 tokens', or bytes: 512MiB.")
]
PolicyOption = Annotated[str, typer.Option(help="A name from `lookm policies`.")]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the user's mistakes, and memory that does not suffice, into one clear line and exit code 2."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        # torch is not imported here for the sake of one name
        foreseen = isinstance(error, NotImplementedError) or type(error).__name__ == "OutOfMemoryError"
        if isinstance(error, RuntimeError) and not foreseen:
            raise
        # torchrun ends the others with the first process that fails: each says by itself why
        whose = f"process {rank()}: " if rank() else ""
        typer.echo(f"{whose}error: {reason(error)}", err=True)
        raise typer.Exit(2) from None


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        from lookm import __version__

        typer.echo(f"lookm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Long multi-image prompts on 5-20 % of the KV cache (LOOK-M)."""


@app.command()
def policies() -> None:
    """List the policies."""
    from lookm import POLICIES
    from lookm.policy import ALIASES, DESCRIPTIONS

    for name in POLICIES:
        typer.echo(f"{name:<26} {DESCRIPTIONS[name]}")
    for alias, name in ALIASES.items():
        typer.echo(f"{alias:<26} = {name}")


@app.command()
def demo(
    budget: BudgetOption = "0.2",
    images: Annotated[int, typer.Option(min=2, max=8, help="Pictures in the prompt.")] = 8,
    policy: PolicyOption = "auto",
    layout: Annotated[str, typer.Option(help="Names `before` or `after` their pictures.")] = "before",
    out: Annotated[Path, typer.Option(help="Folder for the picture and the table.")] = Path("out"),
    seed: Annotated[int | None, typer.Option(help="Draw this prompt again; a fresh one by default.")] = None,
) -> None:
    """Ask a small trained model about pictures, with the full cache and with a compressed one, and compare policies."""
    with one_line_errors():
        one_process("demo")
        check_torchvision()
        from lookm.demo.show import run
        from lookm.policy import resolve_policy
        from lookm.typed import read_budget

        resolve_policy(policy, {})
        run(read_budget(budget), images, policy, layout, out, seed)


@dataclass(kw_only=True)
class Session:
    """What `generate` and `chat` have in common: the model, the media of the first turn, the cache, the sampling."""

    model: Annotated[str, typer.Option(metavar="NAME", help="Folder or hub id of a vision-language (or text) model.")]
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="An image file; repeat for more, in order.")
    ] = None
    video: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A video, an animated GIF or WebP, or a folder of frames; may be repeated."),
    ] = None
    frames: Annotated[int, typer.Option(min=1, help="At most so many frames of each video, at equal distances.")] = 16
    budget: BudgetOption = "0.2"
    policy: Annotated[str, typer.Option(help="A name from `lookm policies`, or module:Class of one's own.")] = "auto"
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A field of the policy, such as rule=average; may be repeated."),
    ] = None
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Sample; the most likely token by default.")] = None
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from this share of probability.")] = None
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from so many tokens.")] = None
    seed: Annotated[int | None, typer.Option(help="Sample the same again.")] = None
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU by default where there is one.")] = "auto"
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own by default.")] = "auto"

    def open(self, progress: bool = True) -> tuple[Checkpoint, list[Image], list[Video]]:
        """The checkpoint without its weights and the media, after everything typed has been checked.

        progress: show bars while files load, on a terminal.
        """
        from lookm.typed import read_budget, read_policy

        read_budget(self.budget)
        read_policy(self.policy, self.option or ())
        from lookm.media import open_image, open_video

        images = [open_image(path) for path in self.image or ()]
        check_torchvision()
        from transformers.utils import logging

        from lookm.generate import load_checkpoint

        logging.set_verbosity_error()
        if rank() or not (progress and sys.stderr.isatty()):
            logging.disable_progress_bar()
        videos = [open_video(path, self.frames) for path in self.video or ()]
        return load_checkpoint(self.model), images, videos

    def load(self, checkpoint: Checkpoint) -> Any:
        """The model."""
        return checkpoint.load_model(self.device, self.dtype)

    def cache(self, model: Any, full: bool = False) -> LookMCache:
        """A fresh cache as typed, or one that keeps everything."""
        from lookm import LookMCache
        from lookm.typed import read_budget, read_policy

        if full:
            return LookMCache(model, 1.0, "full")
        policy = read_policy(self.policy, self.option or ())
        return LookMCache(model, read_budget(self.budget), policy, later_turns="dense")

    @property
    def sampling(self) -> Sampling:
        """The typed sampling."""
        from lookm.generate import Sampling

        return Sampling(self.temperature, self.top_p, self.top_k, shared_seed(self.seed))


def with_session(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes a Session first: on the command line, the session's options beside its own."""
    shared = inspect.signature(Session, eval_str=True).parameters
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

    def run(**typed: Any) -> None:
        session = Session(**{name: typed.pop(name) for name in shared})
        with one_line_errors():
            command(session, **typed)

    keyword = inspect.Parameter.KEYWORD_ONLY
    every = [*shared.values(), *own]
    run.__signature__ = inspect.Signature([each.replace(kind=keyword) for each in every])  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


@app.command()
@with_session
def generate(
    session: Session,
    prompt: Annotated[str, typer.Option(help="The question.")],
    compare: Annotated[bool, typer.Option("--compare", help="Answer with the full cache too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object: text, speed, report.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="The answer alone.")] = False,
) -> None:
    """Answer a prompt about images with any supported checkpoint, on a compressed cache; in parts under torchrun."""
    checkpoint, images, videos = session.open(progress=not (quiet or as_json))
    from lookm.generate import answer, build_inputs, video_arguments

    message = checkpoint.message(prompt, images, videos)
    inputs = build_inputs(checkpoint.processor, [message], **video_arguments(videos))
    model = session.load(checkpoint)
    answers = {}
    for name in ["lookm", "full cache"] if compare else ["lookm"]:
        cache = session.cache(model, full=name != "lookm")
        result = answer(model, checkpoint.processor, inputs, cache, session.max_new_tokens, session.sampling)
        answers[name] = result.to_dict()
        if as_json or rank():
            continue
        typer.echo(f"{name}: {result.text}" if compare else result.text)
        if not quiet:
            speed = f"{result.tokens} tokens in {result.seconds:.1f} s, {result.tokens_per_second:.1f} tokens/s"
            part = f"; the cache of one of {processes()} processes" if processes() > 1 else ""
            typer.echo(f"{speed}, the prompt's reading included{part}\n{result.report}", err=True)
    if as_json and not rank():
        whole = {"full_cache": answers["full cache"]} if compare else {}
        typer.echo(json.dumps(answers["lookm"] | whole))
    if processes() > 1:
        leave()


@app.command()
@with_session
def chat(session: Session) -> None:
    """Talk with a checkpoint about images, on one compressed cache; Ctrl-C ends an answer, /quit the talk."""
    one_process("chat")
    checkpoint, images, videos = session.open()
    from lookm.chat import chat

    # refused before the weights are read
    checkpoint.message("", images, videos)
    model = session.load(checkpoint)
    chat(
        checkpoint,
        model,
        session.cache(model),
        images,
        videos,
        frames=session.frames,
        max_new_tokens=session.max_new_tokens,
        sampling=session.sampling,
    )


@app.command()
def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id of a model.")],
    prompt_tokens: Annotated[str, typer.Option(help="Lengths of the prompts, in tokens.")] = "4096,16384",
    batch: Annotated[str, typer.Option(help="Rows of the batches.")] = "1",
    budget: Annotated[str, typer.Option(help="Budgets of the compressed caches.")] = "0.2,0.05",
    policy: PolicyOption = "auto",
    new_tokens: Annotated[int, typer.Option(min=1, help="Decoded tokens that are timed.")] = 32,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Decode compiled too; by default on a GPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU by default where there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own by default.")] = "auto",
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers there.")] = None,
) -> None:
    """Time full and compressed caches with a checkpoint, on random tokens: prefill, compression, time per token."""
    with one_line_errors():
        one_process("bench")
        from lookm.typed import read_budget, read_counts, read_policy

        lengths, batches = read_counts(prompt_tokens, "prompt-tokens"), read_counts(batch, "batch")
        budgets = [read_budget(each) for each in budget.split(",")]
        read_policy(policy)
        if as_json is not None:
            as_json.write_text("")  # before minutes of work
        check_torchvision()
        from transformers.utils import logging

        from lookm.bench import measure, random_prompt, variants
        from lookm.generate import load_checkpoint

        logging.set_verbosity_error()
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        loaded = load_checkpoint(model, with_processor=False).load_model(device, dtype)
        caches = variants(budgets, policy, loaded.device.type == "cuda" if compiled is None else compiled)
        results = []
        for rows in batches:
            for tokens in lengths:
                result = measure(loaded, random_prompt(loaded, rows, tokens, new_tokens), caches)
                results.append(result.to_dict())
                typer.echo(f"{result}\n")
                if as_json is not None:
                    as_json.write_text(json.dumps({"model": model, "results": results}, indent=1) + "\n")
