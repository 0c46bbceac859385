"""Which chat template a source gets: a built-in one, a file, or the tokenizer folder's own."""

from pathlib import Path

from prep.encode.tokenizer import TokenizerFolder

BUILTIN = ("chatml", "llama3", "gemma", "phi", "mistral", "qwen", "deepseek", "plain")
_FOLDER = Path(__file__).parent / "builtin_templates"


def load_template(name: str | None, folder: TokenizerFolder) -> str | None:
    """The Jinja text: of a built-in template, of a file, or without a name the tokenizer folder's own (None if absent).

    Raises:
        ValueError: neither a built-in name nor a file.
    """
    if name is None:
        return folder.chat_template
    if name in BUILTIN:
        return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"chat template {name}: neither a readable file nor one of {', '.join(BUILTIN)} ({error})"
        ) from None
