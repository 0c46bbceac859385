"""What a `config.json` says: keys that it leaves out mean what transformers takes, and values without sense are refused
in a sentence."""

import re

import pytest
import torch
import transformers
from tiny_models import DENSE, MIXTURES, SIZES

from formats.cost import Model
from prep.inspect.memory import parameters
from train.model.decoder import Decoder
from train.model.families import FAMILIES, model_config
from train.model.keys import Keys

FAMILY_OF = {"gemma3": "gemma3_text"}
SPARSE = {  # beside those of tiny models
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}),
}
SLIDING = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
CASES = {
    **{FAMILY_OF.get(name, name): case for name, case in (DENSE | MIXTURES | SPARSE).items()},
    **{
        f"{name}, windows": (config, options | SLIDING)
        for name, (config, options) in (DENSE | MIXTURES | SPARSE).items()
        if name.startswith(("qwen", "smollm"))
    },
    "llama, stretched": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 3e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
}
BEYOND = {
    "num_hidden_layers": 5,
    "hidden_size": 192,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "initializer_range": 0.01,
    "rms_norm_eps": 1e-4,
}
"""Instead of the sizes of tiny models: such that defaults go with them."""
DERIVED = ("layer_types", "no_rope_layers", "head_dim")
"""Keys that transformers writes down and makes from others: left out, too, so that those others matter."""


def described(case):
    """(the class of transformers, a config.json of it whose sizes are none of its defaults)."""
    name, options = CASES[case]
    options = {key: value for key, value in options.items() if key != "layer_types"} | BEYOND
    if "n_routed_experts" in options:
        options["n_routed_experts"] = 32
    config = getattr(transformers, name)
    return config, config(**(SIZES | options)).to_dict()


def read_keys(described):
    """The keys that the reader of a family asks for, of those that are there."""
    family = FAMILIES[described["model_type"]]
    keys = Keys(family.name, described)
    family.read(keys)
    return keys.known & described.keys()


@pytest.mark.parametrize("case", CASES)
def test_a_key_that_is_left_out_means_what_transformers_takes(case):
    config, whole = described(case)
    without_derived = {key: value for key, value in whole.items() if key not in DERIVED}
    compared, refused = 0, []
    for base in (whole, without_derived):
        taken = read_keys(base)
        assert len(taken) > 10
        for key in (None, *sorted(taken)):
            part = {name: value for name, value in base.items() if name != key}
            try:
                ours = model_config(part)
            except ValueError as error:
                refused.append(str(error))
                continue
            theirs = config(**{name: value for name, value in part.items() if name != "model_type"}).to_dict()
            assert ours == model_config(theirs), f"without {key}"
            compared += 1
    needed = rf"config.json has no '\w+', which a {whole['model_type']} model needs."
    assert all(re.fullmatch(needed, says) for says in refused)
    assert compared > 15


@pytest.mark.parametrize("case", CASES)
def test_prep_plan_takes_for_a_key_that_is_left_out_what_the_trainer_takes(case):
    _, whole = described(case)
    without_derived = {key: value for key, value in whole.items() if key not in DERIVED}
    compared = 0
    for base in (whole, without_derived):
        for key in (None, *sorted(read_keys(base))):
            part = {name: value for name, value in base.items() if name != key}
            try:
                ours = model_config(part)
            except ValueError:
                continue
            with torch.device("meta"):
                model = Decoder(ours)
            assert parameters(part) == sum(p.numel() for p in model.parameters()), f"without {key}"
            cost = Model.from_config(part)
            assert list(cost.windows) == [layer.window or 0 for layer in ours.layers], f"without {key}"
            width = ours.head_dim + (ours.mla.value_dim if ours.mla else ours.head_dim)
            assert cost.pair == 2 * ours.num_heads * width, f"without {key}"
            visited = sum(
                p.numel() * (ours.moe.top_k / ours.moe.num_experts if ".experts." in name else 1)
                for name, p in model.named_parameters()
                if p.ndim > 1 and not name.endswith("bias") and "embed_tokens" not in name and "lm_head" not in name
            )
            assert cost.linear == pytest.approx(2 * (visited + ours.vocab_size * ours.hidden_size), rel=2e-3), key
            compared += 1
    assert compared > 15


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}], ids=["plain", "scaled"])
@pytest.mark.parametrize("case", [case for case in CASES if "," not in case and case != "phi3"])
def test_without_a_base_the_rotary_embedding_is_that_of_the_family(case, scaling):
    """In the new form, and in the old one, which phi3 has not."""
    config, whole = described(case)
    whole.pop("rope_parameters")
    forms = [{"rope_scaling": scaling}]
    if case != "gemma3_text":
        forms.append({"rope_parameters": {**(scaling or {}), "rope_type": "linear" if scaling else "default"}})
    for form in forms:
        given = whole | form
        theirs = config(**{name: value for name, value in given.items() if name != "model_type"}).to_dict()
        assert model_config(given) == model_config(theirs), form


NONSENSE = [
    ("llama", {"vocab_size": -5}, "vocab_size of config.json must be a whole number above 0, not -5."),
    ("llama", {"hidden_size": "4096"}, "hidden_size of config.json must be a whole number above 0, not '4096'."),
    ("llama", {"hidden_size": None}, "config.json has no 'hidden_size', which a llama model needs."),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers of config.json must be a whole number above 0, not 0."),
    ("llama", {"num_hidden_layers": True}, "num_hidden_layers of config.json must be a whole number above 0, not Tr"),
    ("llama", {"intermediate_size": 1.5}, "intermediate_size of config.json must be a whole number above 0, not 1.5."),
    ("llama", {"max_position_embeddings": 0}, "max_position_embeddings of config.json must be a whole number above 0"),
    ("llama", {"head_dim": 15}, "Rotary embeddings turn pairs of a head's dimensions, and config.json asks for 15 of"),
    ("llama", {"head_dim": None, "hidden_size": 100}, "hidden_size 100 of config.json is not a multiple of num_atten"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3 of config.json does not divide num_attention_heads "),
    ("llama", {"num_key_value_heads": -1}, "num_key_value_heads of config.json must be a whole number above 0, not "),
    ("llama", {"num_key_value_heads": 64}, "num_key_value_heads 64 of config.json does not divide num_attention_head"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps of config.json must be a number, 0 or more, not '1e-5'."),
    ("llama", {"hidden_act": "relu"}, "Activation 'relu' is not supported: hidden_act may be silu, swish, gelu_pytor"),
    ("llama", {"hidden_act": ["silu"]}, "Activation ['silu'] is not supported: hidden_act may be silu, swish, gelu_"),
    ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings of config.json must be true or false, not 'no'."),
    ("llama", {"model_type": ["llama"]}, "Models of type ['llama'] are not supported: use one of llama (LlamaForCausa"),
    ("llama", {"rope_parameters": 7}, "rope_parameters of config.json must be an object, not 7."),
    ("llama", {"rope_parameters": {"rope_theta": 0}}, "rope_theta of config.json must be a number above 0, not 0."),
    ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "Rope scaling 'dynamic' is not supported: use default,"),
    ("llama", {"rope_parameters": {"rope_type": 3}}, "rope_type of config.json must be a string, not 3."),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "Rope scaling 'linear' of config.json has no 'factor', "),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": -2}}, "factor of config.json must be a number above"),
    (
        "llama",
        {"rope_parameters": {"rope_theta": float("inf")}},
        "rope_theta of config.json must be a number above 0",
    ),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "Rope scaling 'llama3' of config.json has no"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}},
        "low_freq_factor 4 of config.json must be below high_freq_factor 4.",
    ),
    ("llama", {"partial_rotary_factor": 1.5}, "Rotary embeddings turn pairs of a head's dimensions, and config.json "),
    ("phi3", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "Rope scaling 'longrope' of config.json h"),
    (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "factor": 2}},
        "short_factor of config.json must list 3 numbers, one for each pair of dimensions, not 1.",
    ),
    ("gemma2", {"layer_types": "full_attention"}, "layer_types of config.json must be a list of strings, not 'full_a"),
    ("gemma2", {"layer_types": ["full_attention"]}, "layer_types of config.json must name one of sliding_attention, "),
    ("gemma2", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar of config.json must be a number above 0, not -1"),
    ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping of config.json must be a number above 0, not"),
    ("mistral", {"sliding_window": 0}, "sliding_window of config.json must be 1 or more tokens, not 0."),
    ("mistral", {"sliding_window": -1}, "sliding_window of config.json must be a whole number, 0 or more, not -1."),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers of config.json must name each of the 5 layers, not 2."),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval of config.json must b"),
    ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok 5 of config.json is more than the 4 experts."),
    ("mixtral", {"num_local_experts": 0}, "num_local_experts of config.json must be a whole number above 0, not 0."),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step of config.json must be a whole number above 0, n"),
    ("qwen3_moe", {"mlp_only_layers": "0"}, "mlp_only_layers of config.json must be a list of whole numbers, not '0'"),
    ("qwen2_moe", {"shared_expert_intermediate_size": -8}, "shared_expert_intermediate_size of config.json must be a"),
    ("deepseek_v3", {"n_group": 5}, "n_group 5 of config.json does not make groups of two or more of 32 experts."),
    ("deepseek_v3", {"n_group": 32}, "n_group 32 of config.json does not make groups of two or more of 32 experts."),
    ("deepseek_v3", {"topk_group": 5}, "topk_group 5 of config.json is more than the 4 groups (n_group)."),
    (
        "deepseek_v3",
        {"num_experts_per_tok": 17},
        "num_experts_per_tok 17 of config.json is more than the 16 experts of 2 of 4 groups.",
    ),
    ("deepseek_v3", {"qk_rope_head_dim": 7}, "Rotary embeddings turn pairs of a head's dimensions, and config.json as"),
    ("deepseek_v3", {"v_head_dim": 99}, "v_head_dim 99 is larger than a head of queries (16): not supported."),
    ("gpt_oss", {"swiglu_limit": -1.0}, "swiglu_limit of config.json must be a number above 0, not -1.0."),
]


@pytest.mark.parametrize(
    ("family", "values", "says"), NONSENSE, ids=[f"{family}-{next(iter(values))}" for family, values, _ in NONSENSE]
)
def test_a_value_without_sense_is_refused_in_a_sentence(family, values, says):
    _, config = described(family)
    with pytest.raises(ValueError, match=r"^[^\n]*\.$") as error:
        model_config(config | values)
    assert str(error.value).startswith(says)


def test_a_config_that_is_no_object_is_refused():
    with pytest.raises(ValueError, match=r"^config.json must hold an object, not list\.$"):
        model_config([])
