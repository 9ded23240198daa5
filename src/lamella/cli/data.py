"""`lamella data prepare`: sources to a folder of tokens."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lamella.data.prepare import Summary

app = typer.Typer(no_args_is_help=True, help="Corpora: text in, packed tokens out.")


@app.callback()
def _group() -> None:
    """Keeps `prepare` a subcommand while it is the only one."""


@app.command()
def prepare(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file of the data group, configs/data/NAME.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Changes to it.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what was prepared there before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest for programs.")] = False,
) -> None:
    """Tokenizes a corpus, training the tokenizer first where none is given. A second time it does nothing."""
    from rich.console import Console

    from lamella.config import load_data

    config = load_data(file, overrides or [])
    console = Console(stderr=True)
    with console.status("starting") as status:
        from lamella.data.prepare import prepare as run

        def progress(phase: str, documents: int, size: int) -> None:
            status.update(f"{phase}: {documents:,} documents, {size / 1e6:,.1f} MB")

        summary = run(config, progress, force)
    if as_json:
        print(json.dumps(summary.manifest.model_dump(mode="json") | {"already": summary.already}))
        return
    for line in _lines(summary):
        print(line)


def _lines(summary: "Summary") -> list[str]:
    manifest = summary.manifest
    splits = manifest.splits
    documents, tokens, size = (
        sum(getattr(s, k) for s in splits.values()) for k in ("documents", "tokens", "text_bytes")
    )
    heldout = splits["heldout"]
    if summary.already:
        lines = [f"already prepared: {summary.folder}"]
    else:
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in summary.seconds.items())
        lines = [f"prepared: {summary.folder} ({times})"]
    lines += [
        f"  {documents:,} documents, {tokens:,} tokens, {size:,} bytes of text",
        f"  {tokens / size:.3f} tokens per byte, {manifest.vocab_size:,} pieces",
        f"  held out: {heldout.documents:,} documents, {heldout.tokens:,} tokens ({heldout.tokens / tokens:.2%})",
    ]
    if skipped := ", ".join(f"{count:,} {why}" for why, count in manifest.skipped.items() if count):
        lines.append(f"  skipped: {skipped}")
    wanted = manifest.config.tokenizer
    if wanted.model is None and manifest.vocab_size < wanted.vocab_size:
        lines.append(f"  note: the text yields {manifest.vocab_size:,} pieces of the {wanted.vocab_size:,} asked for")
    if not manifest.exact:
        lines.append(f"  warning: {wanted.model} normalises text: decoding will not give the exact documents back")
    return lines
