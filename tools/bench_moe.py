"""Tokens a second through a layer of experts, forward and backward, beside a plain loop and transformers' own layer.

    python tools/bench_moe.py [--tokens 2048] [--hidden 512] [--intermediate 256] [--experts 64] [--top-k 8]
                              [--threads 2] [--rounds 3] [--json FILE]

All layers hold the same weights, see the same tokens and must give the same output and gradient before they are timed,
in turns, best of the rounds. On CPU in float32, on a GPU in bfloat16, where the share of the device's own dense matrix
product is told, too. "loop" is the reference anybody would write: for each expert the tokens that chose it, indexed,
computed, added. transformers has its modelling code (eager) and what it takes by default (grouped_mm).

The bytes that expert parallelism sends are arithmetic: K·D values a token there and back, (ep − 1)/ep of them leave the
rank when experts are equally busy; backward sends the same.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock  # noqa: E402

from train.model.families import model_config  # noqa: E402
from train.model.moe import MixtureOfExperts  # noqa: E402
from train.packs import TokenPacks  # noqa: E402

PUBLISHED = {  # experts a token, hidden size, ep of a common layout
    "Mixtral 8x7B": (2, 4096, 8),
    "Qwen3-30B-A3B": (8, 2048, 8),
    "GPT-OSS-120B": (4, 2880, 8),
    "DeepSeek-V3": (8, 7168, 64),
}


class Loop(nn.Module):
    """The reference: one expert after the other, with autograd's own indexing."""

    def __init__(self, mixture: MixtureOfExperts):
        super().__init__()
        self.mixture = mixture

    def forward(self, x_TD: Tensor, packs: TokenPacks) -> Tensor:
        experts = self.mixture.experts
        chosen_TK, weights_TK = self.mixture.router(x_TD, packs)
        out_TD = torch.zeros_like(x_TD)
        for e in range(len(experts.gate_proj)):
            token, choice = (chosen_TK == e).nonzero(as_tuple=True)
            x = x_TD[token]
            inner = nn.functional.silu(x @ experts.gate_proj[e].T) * (x @ experts.up_proj[e].T)
            out_TD = out_TD.index_add(0, token, (inner @ experts.down_proj[e].T) * weights_TK[token, choice, None])
        return out_TD


def layers(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Callable]:
    """Name → function of [T, D]; all with the same weights."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=options.hidden,
        moe_intermediate_size=options.intermediate,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        norm_topk_prob=True,
        num_hidden_layers=1,
    )
    ours = MixtureOfExperts(model_config(config.to_dict() | {"architectures": ["Qwen3MoeForCausalLM"]}))
    torch.manual_seed(0)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.02)
    ours.to(device, dtype)
    tokens = torch.tensor(options.tokens, device=device)
    packs = TokenPacks(torch.zeros(options.tokens, dtype=torch.int64, device=device), tokens[None], tokens)
    found: dict[str, Callable] = {"meshpack": lambda x: ours(x, packs), "loop": lambda x: Loop(ours)(x, packs)}
    for implementation in ("eager", "grouped_mm"):
        config = config.__class__(**config.to_dict())
        config._experts_implementation = implementation
        theirs = Qwen3MoeSparseMoeBlock(config).to(device, dtype)
        with torch.no_grad():
            theirs.gate.weight.copy_(ours.router.weight)
            theirs.experts.gate_up_proj.copy_(torch.cat((ours.experts.gate_proj, ours.experts.up_proj), dim=1))
            theirs.experts.down_proj.copy_(ours.experts.down_proj)
        found[f"transformers {implementation}"] = lambda x, theirs=theirs: theirs(x[None])[0]
    return found


def seconds(layer: Callable, x_TD: Tensor) -> tuple[float, Tensor, Tensor]:
    """Of one forward and backward; the output and the gradient of the input. Weights' gradients are made anew."""
    x_TD = x_TD.clone().requires_grad_()
    if x_TD.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    out_TD = layer(x_TD)
    out_TD.backward(torch.ones_like(out_TD))
    if x_TD.is_cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - began
    return took, out_TD.detach(), x_TD.grad


def clear(layer: Callable) -> None:
    for cell in (*(layer.__closure__ or ()), *(layer.__defaults__ or ())):
        module = getattr(cell, "cell_contents", cell)
        if isinstance(module, nn.Module):
            module.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 2048), ("hidden", 512), ("intermediate", 256), ("experts", 64), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    found = layers(options, device, dtype)
    x_TD = torch.randn(options.tokens, options.hidden, device=device, dtype=dtype)
    results = {}
    for name, layer in found.items():
        _, out, grad = seconds(layer, x_TD)
        clear(layer)
        results[name] = (out, grad)
    for name, (out, grad) in results.items():
        for value, reference in ((out, results["loop"][0]), (grad, results["loop"][1])):
            error = ((value - reference).norm() / reference.norm()).item()
            assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5), f"{name} is off by {error}"

    best = dict.fromkeys(found, float("inf"))
    for _ in range(options.rounds):
        for name, layer in found.items():
            best[name] = min(best[name], seconds(layer, x_TD)[0])
            clear(layer)
    flops = 18 * options.tokens * options.top_k * options.hidden * options.intermediate
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))
    peak = 2 * 2048**3 / min(_time(lambda: a @ b, device) for _ in range(5))
    print(
        f"{options.experts} experts, top-{options.top_k}, hidden {options.hidden}, intermediate "
        f"{options.intermediate}, {options.tokens} tokens, {device.type} {dtype}, {options.threads} threads\n"
    )
    record = {"options": {k: v for k, v in vars(options).items() if k != "json"}, "layers": {}, "bytes": {}}
    for name, took in best.items():
        record["layers"][name] = {
            "tokens_per_second": options.tokens / took,
            "meshpack_is_faster_by": took / best["meshpack"],
            "share_of_dense_matmul": flops / took / peak,
        }
        print(
            f"{name:24} {options.tokens / took:9,.0f} tokens/s   meshpack is {took / best['meshpack']:5.2f}x as fast   "
            f"{flops / took / peak:4.0%} of a dense matrix product"
        )
    print("\nexpert parallelism, bf16: bytes a token and layer that leave the rank in forward, and as many in backward")
    for name, (top_k, hidden, ep) in PUBLISHED.items():
        sent = 2 * top_k * hidden * 2 * (ep - 1) / ep
        record["bytes"][f"{name}, ep {ep}"] = sent
        print(f"{name:24} ep {ep:<3} {sent:10,.0f}")
    if options.json:
        options.json.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _time(function: Callable, device: torch.device) -> float:
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
