"""Reading a `config.json` so that no key goes unnoticed."""

import math
from typing import Any

from train.model.config import Rope

_REQUIRED = object()

# Keys that change nothing in a training forward: bookkeeping, generation, and defaults of transformers' base class.
IRRELEVANT = frozenset(
    (
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
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
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "unsloth_version",
        "use_cache",
    )
)
DROPOUTS = ("attention_dropout", "embd_pdrop", "resid_pdrop", "hidden_dropout")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class Keys:
    """The keys of one `config.json`, each to be taken once; `finish` refuses what nobody took."""

    def __init__(self, family: str, config: dict[str, Any]):
        self.family = family
        self._left = {key: value for key, value in config.items() if key not in IRRELEVANT}
        self._config = config

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of `key`; `default` if it is absent. Raises ValueError if it must be there and is not."""
        self._left.pop(key, None)
        if key not in self._config and default is _REQUIRED:
            raise ValueError(f"config.json has no {key!r}, which a {self.family} model needs.")
        return self._config.get(key, default)

    def activation(self, key: str = "hidden_act") -> str:
        name = self.take(key, "silu")
        if name not in ACTIVATIONS:
            raise ValueError(f"Activation {name!r} is not supported: {key} may be {', '.join(ACTIVATIONS)}.")
        return ACTIVATIONS[name]

    def finish(self) -> None:
        """Raises ValueError naming a key that was not read and is neither null, false nor known not to matter."""
        for key in DROPOUTS:
            if self.take(key, 0.0):
                raise ValueError(f"Dropout is not supported: set {key} to 0 in config.json.")
        for key, value in self._left.items():
            if value is not None and value is not False:
                raise ValueError(
                    f"config.json holds {key} = {value!r}, which is not supported for {self.family} models: remove "
                    "the key if it changes nothing, or use a supported architecture as published."
                )


def read_rope(keys: Keys, head_dim: int, which: str | None = None, theta_key: str = "rope_theta") -> Rope:
    """The rotary embedding from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    `which` selects the kind of layer where `rope_parameters` has one entry for each.
    """
    parameters = keys.take("rope_parameters", None)
    if parameters is not None and which is not None and which in parameters:
        parameters = parameters[which]
    scaling = keys.take("rope_scaling", None)
    theta = keys.take(theta_key, 10000.0)
    fraction = keys.take("partial_rotary_factor", 1.0)
    # The old form has the context before stretching in either place.
    context = keys.take("original_max_position_embeddings", None) or keys.take("max_position_embeddings")
    given = {"rope_theta": theta, "partial_rotary_factor": fraction, **(scaling or {}), **(parameters or {})}
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    dim = int(head_dim * given.pop("partial_rotary_factor"))
    common = {"theta": given.pop("rope_theta"), "dim": dim, "kind": kind}
    context = given.pop("original_max_position_embeddings", None) or context
    if kind == "default":
        given.pop("factor", None)
        rope = Rope(**common)
    elif kind == "linear":
        rope = Rope(**common, factor=given.pop("factor"))
    elif kind == "llama3":
        bounds = {key: given.pop(key) for key in ("low_freq_factor", "high_freq_factor")}
        rope = Rope(**common, factor=given.pop("factor"), original_context=context, **bounds)
    elif kind == "yarn":
        factor = given.pop("factor")
        attention_factor = given.pop("attention_factor", None)
        if attention_factor is None:
            attention_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
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
    else:
        raise ValueError(f"Rope scaling {kind!r} is not supported: use default, linear, llama3 or yarn.")
    if given:
        raise ValueError(f"Unknown keys in the rope parameters of config.json: {', '.join(sorted(given))}.")
    return rope
