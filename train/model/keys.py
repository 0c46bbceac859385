"""Reading a `config.json` so that no key goes unnoticed."""

import math
from collections.abc import Mapping
from typing import Any

from formats.defaults import DEFAULTS
from train.model.config import Rope
from train.model.kinds import check_kind

_REQUIRED = object()

# Keys that change nothing in a training forward: bookkeeping, generation, and defaults of transformers' base class.
IRRELEVANT = frozenset(
    (
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "is_encoder_decoder",
        "is_llama_config",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    )
)
DROPOUTS = ("attention_dropout", "embd_pdrop", "resid_pdrop", "hidden_dropout")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class Keys:
    """The keys of one `config.json`, each to be taken once; `finish` refuses what nobody took. `known` are those that
    were asked for. Absent keys have the value that `formats.defaults` gives them."""

    def __init__(self, family: str, config: Mapping[str, Any]):
        self.family = family
        self._defaults = DEFAULTS.get(family, {})
        self._left = {key: value for key, value in config.items() if key not in IRRELEVANT}
        self._config = config
        self.known: set[str] = set()

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of `key`; if it is absent the family's default, or `default`. Raises ValueError if it must be there
        and is not, or is of no sense (`train.model.kinds`)."""
        self._left.pop(key, None)
        self.known.add(key)
        value = self._config.get(key, self._defaults.get(key, default))
        if value is _REQUIRED or (value is None and default is _REQUIRED):
            raise ValueError(f"config.json has no {key!r}, which a {self.family} model needs.")
        check_kind(key, value)
        return value

    def only(self, key: str, value: Any) -> None:
        """Take a key that may be absent or be `value`. Raises ValueError when it says anything else."""
        if self.take(key, value) not in (value, None):
            raise ValueError(f"{key} of config.json must be {value!r} in a {self.family} model.")

    def activation(self, key: str = "hidden_act", default: str = "silu") -> str:
        """Our name of the activation that `key` names."""
        name = self.take(key, None) or default
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise ValueError(f"Activation {name!r} is not supported: {key} may be {', '.join(ACTIVATIONS)}.")
        return ACTIVATIONS[name]

    def finish(self) -> None:
        """Raises ValueError naming a key that was not read and is neither null, false nor known not to matter."""
        for key in DROPOUTS:
            if self.take(key, 0.0):
                raise ValueError(f"Dropout is not supported: set {key} to 0 in config.json.")
        if "quantization_config" in self._left:
            raise ValueError(
                "Quantised weights cannot be trained: convert the model to bfloat16 first (transformers: "
                "from_pretrained(…, dtype=torch.bfloat16) with a dequantising configuration, then save_pretrained)."
            )
        for key, value in self._left.items():
            if value is not None and value is not False:
                raise ValueError(
                    f"config.json holds {key} = {value!r}, which is not supported for {self.family} models: remove "
                    "the key if it changes nothing, or use a supported architecture as published. Keys that are read: "
                    f"{', '.join(sorted(self.known))}."
                )


def read_rope(
    keys: Keys,
    head_dim: int,
    which: str | None = None,
    theta_key: str = "rope_theta",
    default_theta: float = 10000.0,
    default_scaling: Mapping[str, Any] | None = None,
) -> Rope:
    """The rotary embedding from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    `which` selects the kind of layer where `rope_parameters` has an entry for each. A `theta_key` other than
    "rope_theta" is the old form of layers that `rope_scaling` does not concern (Gemma 3's windowed ones).
    """
    parameters = keys.take("rope_parameters", None) or {}
    if which in parameters:
        parameters = parameters[which]
        check_kind("rope_parameters", parameters)
    theta = keys.take(theta_key, None) or default_theta
    scaling = keys.take("rope_scaling", None) or ({} if parameters else default_scaling) or {}
    if theta_key != "rope_theta":
        scaling = {}
    fraction = keys.take("partial_rotary_factor", None) or 1.0
    given = {"rope_theta": theta, "partial_rotary_factor": fraction, **scaling, **parameters}
    for key, value in given.items():
        check_kind(key, value)
    # Where the context before stretching is written down: with the scaling, beside it, or not at all.
    context = keys.take("original_max_position_embeddings", None) or keys.take("max_position_embeddings")
    context = given.pop("original_max_position_embeddings", None) or context
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)

    def need(key: str) -> Any:
        value = given.pop(key, None)
        if value is None:
            raise ValueError(f"Rope scaling {kind!r} of config.json has no {key!r}, which it needs.")
        return value

    dim = int(head_dim * (given.pop("partial_rotary_factor") or 1.0))
    common = {"theta": given.pop("rope_theta") or default_theta, "dim": dim, "kind": kind}
    if kind == "default":
        given.pop("factor", None)
        rope = Rope(**common)
    elif kind == "linear":
        rope = Rope(**common, factor=need("factor"))
    elif kind == "llama3":
        bounds = {key: need(key) for key in ("low_freq_factor", "high_freq_factor")}
        rope = Rope(**common, factor=need("factor"), original_context=context, **bounds)
    elif kind == "yarn":
        factor = need("factor")
        attention_factor = given.pop("attention_factor", None)
        mscale, mscale_all_dim = given.pop("mscale", None), given.pop("mscale_all_dim", None)
        if attention_factor is None:
            stretch = 0.1 * math.log(factor) if factor > 1 else 0.0
            attention_factor = stretch + 1.0
            if mscale and mscale_all_dim:  # DeepSeek: the rest is in the scale of the scores
                attention_factor = (stretch * mscale + 1.0) / (stretch * mscale_all_dim + 1.0)
        betas = {key: given.pop(key, None) or default for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0))}
        truncate = given.pop("truncate", True)
        rope = Rope(
            **common,
            factor=factor,
            original_context=context,
            truncate=truncate,
            attention_factor=attention_factor,
            **betas,
        )
    elif kind in ("longrope", "su"):
        factor = given.pop("factor", None) or keys.take("max_position_embeddings") / context
        attention_factor = given.pop("attention_factor", None)
        if attention_factor is None:
            attention_factor = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
        factors = {f"{size}_factors": tuple(need(f"{size}_factor")) for size in ("short", "long")}
        common["kind"] = "longrope"
        rope = Rope(**common, original_context=context, attention_factor=attention_factor, **factors)
    else:
        raise ValueError(f"Rope scaling {kind!r} is not supported: use default, linear, llama3, yarn or longrope.")
    if given:
        raise ValueError(f"Unknown keys in the rope parameters of config.json: {', '.join(sorted(given))}.")
    return rope
