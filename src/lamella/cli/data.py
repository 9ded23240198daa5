"""`lamella data prepare`: sources to a folder of tokens; `inspect` is in a file of its own."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from lamella.cli import inspect

if TYPE_CHECKING:
    from lamella.data.prepare.prepare import Summary
    from lamella.data.store.manifest import SourceEntry

app = typer.Typer(no_args_is_help=True, help="Corpora: text in, packed tokens out.")
app.command("inspect")(inspect.inspect)


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
        from lamella.data.prepare.prepare import prepare as run

        summary = run(config, lambda report: status.update(str(report)), force)
    if as_json:
        print(json.dumps(summary.manifest.model_dump(mode="json") | {"already": summary.already}))
        return
    for line in _lines(summary):
        print(line)


def _lines(summary: "Summary") -> list[str]:
    from lamella.data.store.manifest import SPLITS

    manifest = summary.manifest
    train, heldout = (manifest.total(split) for split in SPLITS)
    documents, tokens = train.documents + heldout.documents, train.tokens + heldout.tokens
    size = None if train.text_bytes is None or heldout.text_bytes is None else train.text_bytes + heldout.text_bytes
    if summary.already:
        lines = [f"already prepared: {summary.folder}"]
    else:
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in summary.seconds.items())
        resumed = "; went on from an earlier call" if summary.resumed else ""
        lines = [f"prepared: {summary.folder} ({times}{resumed})"]
    text = "" if size is None else f", {size:,} bytes of text"
    lines.append(f"  {documents:,} documents, {tokens:,} tokens{text}")
    if size is not None:
        lines.append(f"  {tokens / size:.3f} tokens per byte, {manifest.vocab_size:,} pieces")
    share = heldout.tokens / tokens
    lines.append(f"  held out: {heldout.documents:,} documents, {heldout.tokens:,} tokens ({share:.2%})")
    if len(manifest.sources) > 1:
        lines += [_of_source(name, entry) for name, entry in manifest.sources.items()]
    if duplicates := sum(source.duplicates for source in manifest.sources.values()):
        kept = "kept" if manifest.config.duplicates == "keep" else "dropped"
        lines.append(f"  duplicates: {duplicates:,} documents, {kept}")
    if skipped := ", ".join(f"{count:,} {why}" for why, count in manifest.skipped.items() if count):
        lines.append(f"  skipped: {skipped}")
    wanted = manifest.config.tokenizer
    if wanted.model is None and manifest.vocab_size < wanted.vocab_size:
        lines.append(f"  note: the text yields {manifest.vocab_size:,} pieces of the {wanted.vocab_size:,} asked for")
    if not manifest.exact:
        lines.append(f"  warning: {wanted.model} normalises text: decoding will not give the exact documents back")
    return lines


def _of_source(name: str, entry: "SourceEntry") -> str:
    documents, tokens = (sum(getattr(split, key) for split in entry.splits.values()) for key in ("documents", "tokens"))
    return f"  {name}: {documents:,} documents, {tokens:,} tokens, {entry.duplicates:,} duplicates"
