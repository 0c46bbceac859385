"""What `prep lint` and `prep plan` are pointed at: raw files, a document store, or packed shards."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from formats.dataset import INDEX_NAME, PackedDataset
from formats.manifest import MANIFEST_NAME
from prep.encode.builtin import load_template
from prep.encode.options import EncodeOptions
from prep.encode.run import encode
from prep.encode.sources import SourceSpec, as_sources, without_tokenizer
from prep.encode.store import DocumentStore, read_store
from prep.encode.templates import ChatTemplate
from prep.encode.tokenizer import TokenizerFolder, read_tokenizer
from prep.inspect.facts import packed_folders
from prep.inspect.lint import finding, lint_packed, lint_store
from prep.ledger import LEDGER_NAME, Ledger

PROBE = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


@contextmanager
def open_store(
    inputs: Sequence[str | SourceSpec], options: EncodeOptions | None, workers: int = 1
) -> Iterator[DocumentStore]:
    """The store that is named, or one encoded from raw files into a temporary folder for as long as it is looked at."""
    if is_store(inputs):
        yield DocumentStore.open(place_of(inputs[0]))
        return
    sources = as_sources(inputs)
    if options is None:
        raise without_tokenizer(sources)
    with tempfile.TemporaryDirectory(prefix="prep-") as folder:
        # Documents without a target are what lint looks for: they are kept here.
        yield encode(sources, Path(folder) / "store", replace(options, keep_untrained=True), workers=workers)


def place_of(item: str | SourceSpec) -> str:
    """The path or address of one input."""
    return item.paths[0] if isinstance(item, SourceSpec) else str(item)


def is_store(inputs: Sequence[str | SourceSpec]) -> bool:
    """Whether `inputs` is one finished document store."""
    return len(inputs) == 1 and Path(place_of(inputs[0])).is_dir() and read_store(Path(place_of(inputs[0]))) is not None


def is_packed(inputs: Sequence[str | SourceSpec]) -> bool:
    """Whether `inputs` is one packed folder (or its train and eval), whole or not."""
    if len(inputs) != 1 or not Path(place_of(inputs[0])).is_dir():
        return False
    names = (MANIFEST_NAME, INDEX_NAME)
    return any((part / name).is_file() for part in packed_folders(Path(place_of(inputs[0]))) for name in names)


def lint_inputs(inputs: Sequence[str | SourceSpec], options: EncodeOptions | None, workers: int = 1) -> dict[str, dict]:
    """Findings (see `prep.inspect.lint.lint`) by name of what was looked at. `workers` share shards and raw input."""
    results = {}
    if is_packed(inputs):
        for part in packed_folders(Path(place_of(inputs[0]))):
            ledger = Ledger.read_file(part / LEDGER_NAME).to_json()
            results[str(part)] = lint_packed(PackedDataset(part), ledger, workers)
    else:
        with open_store(inputs, options, workers) as store:
            results[" ".join(map(place_of, inputs))] = lint_store(store)
    if options is not None:
        for found in lint_template(read_tokenizer(options.tokenizer), options.chat_template):
            for result in results.values():
                result["findings"].append(found)
                result["warnings"] += found["level"] == "warning"
    return results


def lint_template(folder: TokenizerFolder, name: str | None = None) -> list[dict]:
    """Whether a chat template (by a name that `load_template` knows, else the folder's own) renders the beginning of a
    chat as the beginning of its rendering.

    A template that rewrites earlier turns (such as one that takes the reasoning out of all but the last) trains turns
    that the model never sees so when it is used.
    """
    text = load_template(name, folder)
    if text is None:
        return []
    template = ChatTemplate(text, folder.special_tokens, "2024-01-01")
    try:
        whole = template.render(PROBE)
        stable = whole.startswith(template.render(PROBE[:2])) and whole.startswith(
            template.render(PROBE[:3], add_generation_prompt=True)
        )
    except ValueError as error:
        return [finding("template-refuses", "warning", 1, 1.0, f"a plain chat of two rounds is refused: {error}", [])]
    if stable:
        return []
    text = "the chat template does not render the beginning of a chat as the beginning of the whole"
    return [finding("template-prefix-unstable", "warning", 1, 1.0, text, [])]
