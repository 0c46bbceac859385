"""Tokenizer folders with real merges, trained on a few lines: small, and without the network."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = [
    "user assistant system tool message\n\nHello there, how are you today? I am fine, thank you!\n",
    "The quick brown fox jumps over the lazy dog.\n\n  indented code:\n    return x + 1\n\n\n",
    "Größe, naïve café, emigrés; привет мир; 你好，世界; こんにちは; 😀😀 👩‍👩‍👧‍👦\n",
    '<think>\nreasoning\n</think>\n\n{"name": "weather", "arguments": {"city": "Zürich"}}\n',
] * 50


def write_byte_level(folder: Path, *, chat_template: str | None = CHATML, nfc: bool = False, **config) -> Path:
    """Byte-level BPE with the GPT-4 split, as Llama-3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    return _write(folder, tokenizer, chat_template, config)


def write_sentencepiece(folder: Path, *, chat_template: str | None = CHATML, **config) -> Path:
    """BPE with ▁ for spaces and bytes as a fallback, as Gemma has it; it puts bos before a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<bos>", *[f"<0x{b:02X}>" for b in range(256)]]
    _train(tokenizer, trainers.BpeTrainer(vocab_size=700, special_tokens=specials, show_progress=False))
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return _write(folder, tokenizer, chat_template, {"bos_token": "<bos>", **config})


def _train(tokenizer, trainer) -> None:
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])


def _write(folder: Path, tokenizer: Tokenizer, chat_template: str | None, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    content |= {"chat_template": chat_template} if chat_template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(content | config), encoding="utf-8")
    return folder
