"""What a store is made of: the plan that is written before the first unit, and in what two of them differ."""

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import asdict

from prep.encode.options import EncodeOptions
from prep.encode.sources import SHARES, InputFile, SourceSpec
from prep.encode.store import STORE_VERSION

_PACKAGES = ("jinja2", "numpy", "orjson", "pyarrow", "tokenizers", "xxhash")


def make_plan(facts: dict, sources: Sequence[SourceSpec], files: Sequence[InputFile], options: EncodeOptions) -> dict:
    """The plan of a run, JSON-compatible. `facts`: what `run` knows of the tokenizer and the templates."""
    engine = facts["engine"]
    templates = facts.pop("source_templates")
    identities = [_source_identity(*pair) for pair in zip(sources, templates, strict=True)]
    packages = [*_PACKAGES, *(["fastokens"] if engine == "fast" else [])]
    if any(file.format == "hf" for file in files):
        packages.append("datasets")
    return {
        "store_version": STORE_VERSION,
        "inputs": [file.to_json() for file in files],
        "input_formats": [[sources[file.source].name, file.format] for file in files],
        "options": {**options.identity(), "sources": identities},
        **facts,
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


def of_units(plan: dict) -> dict:
    """What of a plan the units depend on: which of their documents are used is decided when all are there."""
    options = {name: value for name, value in plan["options"].items() if name != "dedup"}
    options["sources"] = [{k: v for k, v in source.items() if k not in SHARES} for source in options["sources"]]
    return {**plan, "options": options}


def _source_identity(source: SourceSpec, template: str) -> dict:
    value = asdict(source)
    del value["paths"], value["template"]  # inputs and template are hashed by content
    value["template_hash"] = template
    value["columns"] = dict(source.columns)
    return value


def refuse_difference(name: str, theirs: dict, ours: dict) -> None:
    """Raise ValueError where the plan that the store `name` has, or its store.json, is not ours."""
    different = list(_differences("", theirs, ours))
    if different:
        raise ValueError(
            f"{name}: was made with other {', '.join(different)}; use the same again or give another folder"
        )


def _differences(prefix: str, theirs: object, ours: object):
    if theirs == ours:
        return
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(ours.keys() & theirs.keys()):
            yield from _differences(f"{prefix}{key}.", theirs[key], ours[key])
        if not prefix:  # a finished store holds more than its plan
            return
        yield from (f"{prefix}{key}" for key in sorted(ours.keys() ^ theirs.keys()))
    else:
        yield f"{prefix[:-1]} ({_short(theirs)}, now {_short(ours)})"


def _short(value: object) -> str:
    if isinstance(value, list):
        value = [item.get("name", item) if isinstance(item, dict) else item for item in value]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "…"
