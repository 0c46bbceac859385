"""Tokens a second through a layer of experts, forward and backward, beside a plain loop and transformers' own layer.

    python tools/bench_moe.py [--tokens 2048] [--hidden 512] [--intermediate 256] [--experts 64] [--top-k 8]
                              [--threads 2] [--rounds 9] [--json FILE]

All layers hold the same weights, see the same tokens and must give the same output and gradients before they are timed,
in turns; of the rounds the median counts. On CPU in float32, on a GPU in bfloat16. "loop" is the reference that anybody
would write: for each expert the tokens that chose it, indexed, computed, added. transformers has several ways; the one
that a model built without a word about it takes on this device is marked.

"share" is that of a dense matrix product: the layer's multiplications (2 a weight and token forward, 4 backward) a
second over those of a square product of 2048 (on a GPU 8192) in the same type with the same threads. "products alone"
are the layer's nine products and nothing else: no router, no sorting, no activation. On a CPU they are made expert by
expert, by all threads, into buffers that are kept; on a GPU by the kernel that takes all experts at once, so that their
share is the peak of grouped products. Gradients of a round are gone before the next; meshpack keeps their memory.

The bytes that expert parallelism sends are arithmetic: K·D values a token there and back, (ep − 1)/ep of them leave the
rank when experts are equally busy; backward sends the same.

FILE keeps what it holds of other numbers of tokens.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock  # noqa: E402

from train.model.experts import has_kernel  # noqa: E402
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
        weights_TK = weights_TK.to(x_TD.dtype)
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
    chosen = default_implementation(config)
    for implementation in ("eager", "grouped_mm"):
        config = config.__class__(**config.to_dict())
        config._experts_implementation = implementation
        theirs = Qwen3MoeSparseMoeBlock(config).to(device, dtype)
        with torch.no_grad():
            theirs.gate.weight.copy_(ours.router.weight)
            theirs.experts.gate_up_proj.copy_(torch.cat((ours.experts.gate_proj, ours.experts.up_proj), dim=1))
            theirs.experts.down_proj.copy_(ours.experts.down_proj)
        mark = " (its default)" * (implementation == chosen)
        found[f"transformers {implementation}{mark}"] = lambda x, theirs=theirs: theirs(x[None])[0]
    return found


def default_implementation(config: transformers.PretrainedConfig) -> str:
    """What transformers takes for such a model when it is told nothing."""
    tiny = config.to_dict() | {"hidden_size": 8, "moe_intermediate_size": 8, "vocab_size": 8, "num_attention_heads": 1}
    model = transformers.AutoModelForCausalLM.from_config(config.__class__(**(tiny | {"num_key_value_heads": 1})))
    return model.config._experts_implementation


def seconds(layer: Callable, x_TD: Tensor) -> tuple[float, float, Tensor, Tensor]:
    """Of a forward, and of forward and backward; the output and the gradient of the input. Weights' gradients are made
    anew."""
    x_TD = x_TD.clone().requires_grad_()
    _wait(x_TD.device)
    began = time.perf_counter()
    out_TD = layer(x_TD)
    _wait(x_TD.device)
    forward = time.perf_counter() - began
    out_TD.backward(torch.ones_like(out_TD))
    _wait(x_TD.device)
    return forward, time.perf_counter() - began, out_TD.detach(), x_TD.grad


def products_alone(options: argparse.Namespace, x_TD: Tensor) -> Callable[[], tuple[float, float]]:
    """Seconds of the three products of a forward for every expert, and of all nine, for rows that are shared out as the
    router of the layers does it nearly enough: at random."""
    D, F, E = options.hidden, options.intermediate, options.experts
    chosen = torch.rand(options.tokens, E).topk(options.top_k).indices
    rows = chosen.flatten().bincount(minlength=E)
    down = x_TD.new_ones(E, D, F)
    gate, up = (x_TD.new_ones(E, F, D) for _ in range(2))
    if has_kernel(x_TD, gate):
        return _timed(*_grouped(rows.cumsum(0).int().to(x_TD.device), gate, up, down), x_TD.device)
    wide, narrow, out_wide, out_narrow = (x_TD.new_ones(int(rows.max()), size) for size in (D, F, D, F))
    gradients = [torch.zeros_like(weight) for weight in (gate, up, down)]

    def forward() -> None:
        for e, n in enumerate(rows.tolist()):
            for weight in (gate, up):
                torch.mm(wide[:n], weight[e].t(), out=out_narrow[:n])
            torch.mm(narrow[:n], down[e].t(), out=out_wide[:n])

    def backward() -> None:
        for e, n in enumerate(rows.tolist()):
            torch.mm(wide[:n], down[e], out=out_narrow[:n])
            torch.mm(wide[:n].t(), narrow[:n], out=gradients[2][e])
            for weight, gradient in ((gate, gradients[0]), (up, gradients[1])):
                torch.mm(narrow[:n], weight[e], out=out_wide[:n])
                torch.mm(narrow[:n].t(), wide[:n], out=gradient[e])

    return _timed(forward, backward, x_TD.device)


def _grouped(ends_E: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Callable, Callable]:
    """The products of all experts at once, forward and backward."""
    product = nn.functional.grouped_mm
    wide, narrow = (gate.new_ones(int(ends_E[-1]), size) for size in gate.shape[:0:-1])

    def forward() -> None:
        for weight in (gate, up):
            product(wide, weight.transpose(1, 2), offs=ends_E)
        product(narrow, down.transpose(1, 2), offs=ends_E)

    def backward() -> None:
        product(wide, down, offs=ends_E)
        product(wide.t(), narrow, offs=ends_E)
        for weight in (gate, up):
            product(narrow, weight, offs=ends_E)
            product(narrow.t(), wide, offs=ends_E)

    return forward, backward


def _timed(forward: Callable, backward: Callable, device: torch.device) -> Callable[[], tuple[float, float]]:
    def run() -> tuple[float, float]:
        took = _time(forward, device)
        return took, took + _time(backward, device)

    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


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
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    found = layers(options, device, dtype)
    x_TD = torch.randn(options.tokens, options.hidden, device=device, dtype=dtype)
    results = {}
    for name, layer in found.items():
        results[name] = seconds(layer, x_TD)[2:]
        clear(layer)
    for name, values in results.items():
        for value, reference in zip(values, results["loop"], strict=True):
            error_T = (value - reference).norm(dim=1) / reference.norm(dim=1)
            # transformers routes in the type of the weights: in half precision a near tie sends a token elsewhere.
            error = (error_T.median() if dtype == torch.bfloat16 else error_T.max()).item()
            assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5), f"{name} is off by {error}"

    took = {name: [] for name in (*found, "products alone")}
    alone = products_alone(options, x_TD)
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    of_dense = []
    for _ in range(options.rounds):
        for name, layer in found.items():
            took[name].append(seconds(layer, x_TD)[:2])
            clear(layer)
        took["products alone"].append(alone())
        of_dense.append(_time(lambda: a @ b, device))
    median = {name: tuple(map(statistics.median, zip(*times, strict=True))) for name, times in took.items()}
    forward_flops = 6 * options.tokens * options.top_k * options.hidden * options.intermediate
    peak = 2 * size**3 / statistics.median(of_dense)
    print(
        f"{options.experts} experts, top-{options.top_k}, hidden {options.hidden}, intermediate "
        f"{options.intermediate}, {options.tokens} tokens, {device.type} {dtype}, {options.threads} threads\n\n"
        f"{'':40}{'forward':>28}{'forward and backward':>34}"
    )
    record = {"options": {k: v for k, v in vars(options).items() if k != "json"}, "layers": {}}
    sent_bytes = {}
    for name, times in median.items():
        facts, line = {}, f"{name:40}"
        for part, time_taken, flops, ours in zip(
            ("forward", "forward_backward"), times, (forward_flops, 3 * forward_flops), median["meshpack"], strict=True
        ):
            facts[part] = {
                "tokens_per_second": options.tokens / time_taken,
                "meshpack_is_faster_by": time_taken / ours,
                "share_of_dense_matmul": flops / time_taken / peak,
            }
            line += (
                f"{options.tokens / time_taken:12,.0f} /s {time_taken / ours:5.2f}x {flops / time_taken / peak:5.0%} "
            )
        record["layers"][name] = facts
        print(line)
    print("\ntokens a second; how much longer it takes than meshpack; share of a dense matrix product")
    print("\nexpert parallelism, bf16: bytes a token and layer that leave the rank in forward, and as many in backward")
    for name, (top_k, hidden, ep) in PUBLISHED.items():
        sent = 2 * top_k * hidden * 2 * (ep - 1) / ep
        sent_bytes[f"{name}, ep {ep}"] = sent
        print(f"{name:24} ep {ep:<3} {sent:10,.0f}")
    if options.json:
        known = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
        known |= {"bytes": sent_bytes, f"{options.tokens} tokens": record}
        options.json.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _time(function: Callable, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
