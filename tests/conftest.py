"""Fixtures that several rooms share: model folders in the Hugging Face layout.

torch and transformers are imported inside the fixtures: the tests of `prep` must not pay seconds for them.
"""

from pathlib import Path

import pytest
from hypothesis import settings

from byte_tokenizer import write_byte_tokenizer
from tools.smollm2 import convert, find_gguf

SMOLLM2_CACHE = Path(__file__).parent.parent / "build" / "smollm2"  # ignored by git, kept between runs
TINY_VOCABULARY = 320  # 3 special tokens, 256 bytes, the rest never used: more rows than the tokenizer has ids

# Tests share their cores: how long an example takes says nothing.
settings.register_profile("meshpack", deadline=None)
settings.load_profile("meshpack")


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct, the real one, as a Hugging Face folder in float32 (made once, about 10 s)."""
    try:
        find_gguf()
    except FileNotFoundError as missing:
        pytest.skip(f"NOT TESTED, the real model is absent: {missing}")
    return convert(SMOLLM2_CACHE)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer Llama with grouped queries (4 heads, 2 kv heads), tied embeddings and a byte-level tokenizer."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama-tied", tied=True)


@pytest.fixture(scope="session")
def tiny_llama_untied_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_llama_dir`, with a head of its own."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama-untied", tied=False)


def write_tiny_llama(folder: Path, *, tied: bool) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():  # large enough that every gradient matters, norms not all 1
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.15)
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder
