"""The `lookm` command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from lookm.budget import parse_budget
from lookm.policy import ALIASES, DESCRIPTIONS, POLICIES, resolve_policy

app = typer.Typer(
    help="Long multi-image prompts on 5-20 % of the KV cache (LOOK-M).", no_args_is_help=True, add_completion=False
)
BudgetOption = Annotated[
    str, typer.Option(help="What stays of the prompt: a fraction (0.2), tokens (500) or bytes (512MiB).")
]
PolicyOption = Annotated[str, typer.Option(help="A name from `lookm policies`.")]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the user's mistakes into one clear line and exit code 2."""
    try:
        yield
    except (ValueError, NotImplementedError, OSError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        typer.echo(f"error: {first_line}", err=True)
        raise typer.Exit(2) from None


def read_budget(text: str) -> float | int | str:
    """The budget a user typed: digits are tokens, a number with a point is a fraction, anything else bytes."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        parse_budget(value)
        return value
    parse_budget(text)
    return text


@app.command()
def policies() -> None:
    """List the policies."""
    for name in POLICIES:
        typer.echo(f"{name:<26} {DESCRIPTIONS[name]}")
    for alias, name in ALIASES.items():
        typer.echo(f"{alias:<26} = {name}")


@app.command()
def demo(
    budget: BudgetOption = "0.2",
    images: Annotated[int, typer.Option(min=2, max=8, help="Pictures in the prompt.")] = 8,
    policy: PolicyOption = "lookm",
    layout: Annotated[str, typer.Option(help="Names `before` or `after` their pictures.")] = "before",
    out: Annotated[Path, typer.Option(help="Folder for the picture and the table.")] = Path("out"),
    seed: Annotated[int | None, typer.Option(help="Draw this prompt again; a fresh one by default.")] = None,
) -> None:
    """Ask a small trained model about pictures, with the full cache and with a compressed one, and compare policies."""
    from lookm.demo.show import run

    with one_line_errors():
        resolve_policy(policy, {})
        run(read_budget(budget), images, policy, layout, out, seed)


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Folder or hub id of a vision-language model.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[list[Path] | None, typer.Option(help="An image file; repeat for more, in order.")] = None,
    budget: BudgetOption = "0.2",
    policy: PolicyOption = "lookm",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with the full cache too.")] = False,
) -> None:
    """Answer a prompt about images with any supported checkpoint, on a compressed cache."""
    from lookm.generate import answer, build_inputs, load_model, load_processor, open_images

    with one_line_errors():
        resolve_policy(policy, {})
        chosen = read_budget(budget)
        pictures = open_images(image or [])
        processor = load_processor(model)
        inputs = build_inputs(processor, pictures, prompt)
        loaded = load_model(model)
        runs = {"lookm": (chosen, policy)} | ({"full cache": (1.0, "full")} if compare else {})
        for name, (share, rule) in runs.items():
            result = answer(loaded, processor, inputs, share, rule, max_new_tokens)
            typer.echo(f"{name} ({result.seconds:.1f} s): {result.text}" if compare else result.text)
            typer.echo(str(result.report), err=True)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
