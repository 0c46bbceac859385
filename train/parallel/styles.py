"""Tensor-parallel styles: how one module of the decoder runs on the n ranks of the `tp` axis.

A style takes a module and returns what stands in its place under the same name: it places the parameters (DTensors over
`tp`, which FSDP shards further) and spells out what its forward sends. Activations are plain local tensors and stand in
one of four relations to the ranks, which say what their gradients are:

stream    the residual stream. With sequence parallelism each rank holds its T/n tokens, without all hold all T.
row       all T tokens on every rank; of a *gradient* every rank has a summand, for it makes its own use of the row.
features  all T tokens, each rank some columns (heads, intermediate features).
summands  [T, D] on every rank; the value is their sum.

`to_row`, `sum_to_stream` and `own_stream` of `TensorAxis` are the only ways between them. Backward is linear in the
gradient that comes in, so a module with whole weights inside a row needs nothing but the sum of its weights' gradients.

| style      | modules                       | weights   | from → to                                          |
|------------|-------------------------------|-----------|----------------------------------------------------|
| `gather`   | Attention, Mlp                |           | stream → stream, as their parts do in between      |
|            | mixture of experts            |           | stream → stream; shared: an Mlp; experts: ep's     |
| `column`   | linear                        | Shard(0)  | row → features                                     |
| `kv`       | linear, norm over all heads   | Shard(0)  | `column`, `features`; where there are fewer        |
|            |                               | or whole  | key/value heads than ranks, some have the same one |
| `row`      | linear                        | Shard(1)  | features → summands → stream                       |
| `features` | norm over all heads           | Shard(0)  | features → features                                |
| `vocab`    | embedding, head               | Shard(0)  | ids → summands → stream; stream → row → loss       |
| `stream`   | norm, linear, embedding, head | whole     | stream → stream                                    |
|            | Mlp                           |           | the same for all its parts                         |
| `whole`    | norm, linear                  | whole     | row → row, or features of a head                   |
|            | Attention, Mlp                |           | stream → row → stream: every rank does all work    |
| `routed`   | router                        | whole     | own tokens → own tokens, inside a mixture          |

Where sizes are not multiples of n, ranks hold uneven parts (`torch.chunk`: the first ones the larger), exactly; FSDP
then cuts their columns, of which there must be a multiple of its ranks.
Gradients of whole weights are `Partial` over tp where each rank used them for other tokens or heads; FSDP sums them
before it shards (which is why it also runs on a mesh of one when tp > 1).

Shapes: T tokens of this context-parallel rank, D hidden size, F features, V vocabulary, n ranks of the tp axis.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from train.loss import VocabPart, linear_cross_entropy
from train.model.decoder import Attention, Head
from train.model.mla import LatentAttention
from train.model.mlp import Mlp
from train.model.moe import MixtureOfExperts
from train.model.norm import Norm
from train.model.router import Router
from train.packs import TokenPacks
from train.parallel.collectives import all_reduce, sum_to_all
from train.parallel.tensor_axis import Site, local


class _Linear(nn.Module):
    """The parameters of a linear layer; `weight` and `bias` say how they are placed."""

    weight_placement: Placement = Replicate()
    bias_placement: Placement = Replicate()

    def __init__(self, linear: nn.Linear, site: Site):
        super().__init__()
        self.axis = site.axis
        self.weight = site.place(linear, "weight", self.weight_placement)
        self.bias = site.place(linear, "bias", self.bias_placement)


class ColumnLinear(_Linear):
    """Each rank computes some of the features: its rows of the weight."""

    weight_placement = bias_placement = Shard(0)

    def forward(self, x_TD: Tensor) -> Tensor:
        return nn.functional.linear(x_TD, local(self.weight, Shard(0)), local(self.bias, Shard(0)))


class KvLinear(_Linear):
    """Fewer key/value heads than ranks: the weight is whole, each rank computes the one head that its queries use."""

    def __init__(self, linear: nn.Linear, site: Site):
        super().__init__(linear, site)
        self.head = _own_kv_head(site)

    def forward(self, x_TD: Tensor) -> Tensor:
        weight, bias = (local(p, Replicate(), Partial()) for p in (self.weight, self.bias))
        return nn.functional.linear(x_TD, weight[self.head], None if bias is None else bias[self.head])


class RowLinear(_Linear):
    """Each rank has some of the input's features: its columns of the weight, and a summand of the output."""

    weight_placement = Shard(1)

    def forward(self, x_TF: Tensor) -> Tensor:
        x_TD = self.axis.sum_to_stream(nn.functional.linear(x_TF, local(self.weight, Shard(1))))
        bias = local(self.bias, Replicate(), self.axis.stream_grad)
        return x_TD if bias is None else x_TD + bias


class WholeLinear(_Linear):
    """The whole weight on every rank, with the gradient that `grad` says."""

    def __init__(self, linear: nn.Linear, site: Site, grad: Placement):
        super().__init__(linear, site)
        self.grad = grad

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(
            x, local(self.weight, Replicate(), self.grad), local(self.bias, Replicate(), self.grad)
        )


class WholeNorm(Norm):
    """A norm over dimensions that every rank has: of a token of the stream, or of a head."""

    def __init__(self, norm: Norm, site: Site, grad: Placement):
        nn.Module.__init__(self)
        self.eps, self.offset, self.grad = norm.eps, norm.offset, grad
        self.weight = site.place(norm, "weight", Replicate())

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x, local(self.weight, Replicate(), self.grad))


class FeatureNorm(Norm):
    """A norm over features that lie on different ranks: one number a token is summed over the ranks.

    Where key/value heads are repeated (`rows` is the one of this rank), every head is counted equally often.
    """

    def __init__(self, norm: Norm, site: Site, rows: slice | None = None):
        nn.Module.__init__(self)
        self.eps, self.offset, self.axis, self.rows = norm.eps, norm.offset, site.axis, rows
        self.features = norm.weight.shape[0] if rows is None else (rows.stop - rows.start) * site.axis.size
        self.weight = site.place(norm, "weight", Shard(0) if rows is None else Replicate())

    def forward(self, x_TF: Tensor) -> Tensor:
        if self.rows is None:
            weight = local(self.weight, Shard(0))
        else:
            weight = local(self.weight, Replicate(), Partial())[self.rows]
        wide = x_TF.to(torch.promote_types(x_TF.dtype, torch.float32))
        squares = all_reduce(wide.square().sum(-1, keepdim=True), self.axis.group)
        normed = wide * torch.rsqrt(squares / self.features + self.eps)
        return (normed * (weight.to(wide.dtype) + self.offset)).to(x_TF.dtype)


class VocabEmbedding(nn.Module):
    """Each rank has some rows of the table; ids that are not among them give 0, and the sum is the whole."""

    def __init__(self, embedding: nn.Embedding, site: Site):
        super().__init__()
        self.axis = site.axis
        self.rows = site.axis.part(embedding.num_embeddings)
        self.weight = site.place(embedding, "weight", Shard(0))

    def forward(self, input_ids_T: Tensor) -> Tensor:
        is_here = (input_ids_T >= self.rows.start) & (input_ids_T < self.rows.stop)
        rows_T = torch.where(is_here, input_ids_T - self.rows.start, 0)
        x_TD = nn.functional.embedding(rows_T, local(self.weight, Shard(0)))
        return self.axis.sum_to_stream(x_TD.masked_fill(~is_here[:, None], 0.0))


class StreamEmbedding(nn.Module):
    """The whole table on every rank, which looks up its own tokens."""

    def __init__(self, embedding: nn.Embedding, site: Site):
        super().__init__()
        self.axis = site.axis
        self.weight = site.place(embedding, "weight", Replicate())

    def forward(self, input_ids_T: Tensor) -> Tensor:
        weight = local(self.weight, Replicate(), self.axis.stream_grad)
        return nn.functional.embedding(self.axis.own_stream(input_ids_T), weight)


class VocabHead(nn.Module):
    """Each rank has some rows of the head, so some columns of the logits, which never leave it. The loss is the same
    number on all ranks."""

    def __init__(self, head: Head, site: Site):
        super().__init__()
        self.axis, self.softcap = site.axis, head.softcap
        words = site.config.vocab_size
        self.part = VocabPart(site.axis.group, site.axis.part(words), most=-(-words // site.axis.size))
        self.weight = site.place(head, "weight", Shard(0))

    def forward(self, x_TD: Tensor, labels_T: Tensor | None, tied_weight_VD: DTensor | None = None) -> Tensor:
        """Without labels: this rank's columns of the logits of all T tokens."""
        weight = local(self.weight if tied_weight_VD is None else tied_weight_VD, Shard(0))
        x_TD = self.axis.to_row(x_TD)
        if labels_T is not None:
            return linear_cross_entropy(x_TD, weight, labels_T, softcap=self.softcap, vocab=self.part)
        return Head.logits(x_TD, weight, self.softcap)


class StreamHead(nn.Module):
    """The whole head on every rank, for its own tokens; the loss is summed over the ranks."""

    def __init__(self, head: Head, site: Site):
        super().__init__()
        self.axis, self.softcap = site.axis, head.softcap
        self.weight = site.place(head, "weight", Replicate())

    def forward(self, x_TD: Tensor, labels_T: Tensor | None, tied_weight_VD: DTensor | None = None) -> Tensor:
        """Without labels: the logits of the tokens of the stream."""
        weight = self.weight if tied_weight_VD is None else tied_weight_VD
        weight = local(weight, Replicate(), self.axis.stream_grad)
        if labels_T is None:
            return Head.logits(x_TD, weight, self.softcap)
        loss = linear_cross_entropy(x_TD, weight, self.axis.own_stream(labels_T), softcap=self.softcap)
        return sum_to_all(loss, self.axis.group) if self.axis.sequence else loss


class WholeRouter(Router):
    """A router with whole weights, for the tokens of this rank."""

    def __init__(self, router: Router, site: Site):
        nn.Module.__init__(self)
        vars(self).update({name: value for name, value in vars(router).items() if name not in vars(self)})
        self.weight, self.bias = (site.place(router, name, Replicate()) for name in ("weight", "bias"))
        self.register_buffer("correction_bias", router.correction_bias)

    def projection(self) -> tuple[Tensor, Tensor | None]:
        return local(self.weight, Replicate(), Partial()), local(self.bias, Replicate(), Partial())


def _mixture(mixture: MixtureOfExperts, site: Site) -> nn.Module:
    """Experts are not cut over tensor ranks, which use them as data ranks do, each for its own tokens: those of the
    stream, or with whole sequences its share of the row, of which it gives a summand back that is 0 elsewhere. The
    shared expert is another module from stream to stream."""
    axis, forward = site.axis, mixture.forward

    def of_own_tokens(x_TD: Tensor, packs: TokenPacks) -> Tensor:
        tokens = len(packs.pack)
        own = axis.part(tokens)
        if axis.sequence:
            return forward(x_TD, packs.of(own))
        out_TD, shared_TD = mixture.parts(axis.to_row(x_TD)[own], packs.of(own), x_TD)
        out_TD = axis.sum_to_stream(nn.functional.pad(out_TD, (0, 0, own.start, tokens - own.stop)))
        return out_TD if shared_TD is None else out_TD + shared_TD

    mixture.forward = of_own_tokens
    return mixture


def _own_kv_head(site: Site) -> slice:
    """Rows of the one key/value head that this rank's queries use, where there are fewer heads than ranks."""
    head, width = site.axis.rank * site.config.num_kv_heads // site.axis.size, site.config.head_dim
    return slice(head * width, (head + 1) * width)


def _kv_linear(linear: nn.Linear, site: Site) -> nn.Module:
    return (ColumnLinear if site.config.num_kv_heads >= site.axis.size else KvLinear)(linear, site)


def _kv_norm(norm: Norm, site: Site) -> nn.Module:
    return FeatureNorm(norm, site, None if site.config.num_kv_heads >= site.axis.size else _own_kv_head(site))


def _gather(module: nn.Module, site: Site) -> nn.Module:
    """The first argument of `module` comes from the stream and is wanted as a row."""
    module.register_forward_pre_hook(lambda _, args: (site.axis.to_row(args[0]), *args[1:]))
    return module


def _gather_attention(attention: Attention | LatentAttention, site: Site) -> nn.Module:
    heads, kv_heads, size = site.config.num_heads, site.config.num_kv_heads, site.axis.size
    if heads % size or (kv_heads % size and size % kv_heads):
        raise ValueError(
            f"{site.name} has {heads} query and {kv_heads} key/value heads, which --tp {size} cannot share out: take a "
            "--tp that divides the query heads and divides the key/value heads or is a multiple of them, or compute "
            f"attention whole on every rank with --tp-plan '{site.name}=whole'"
        )
    if isinstance(attention, Attention):
        attention.sinks = site.place(attention, "sinks", Shard(0))
    return _gather(attention, site)


def _whole(module: nn.Module, site: Site) -> nn.Module:
    module.register_forward_hook(lambda _, args, x_TD: site.axis.own_stream(x_TD))
    return _gather(module, site)


def _on_stream(cls: type) -> Callable[[nn.Module, Site], nn.Module]:
    return lambda module, site: cls(module, site, site.axis.stream_grad)


def _on_row(cls: type) -> Callable[[nn.Module, Site], nn.Module]:
    return lambda module, site: cls(module, site, Partial())


STYLES: dict[str, dict[type, Callable[[nn.Module, Site], nn.Module]]] = {
    "gather": {
        Attention: _gather_attention,
        LatentAttention: _gather_attention,
        Mlp: _gather,
        MixtureOfExperts: _mixture,
    },
    "column": {nn.Linear: ColumnLinear},
    "kv": {nn.Linear: _kv_linear, Norm: _kv_norm},
    "row": {nn.Linear: RowLinear},
    "features": {Norm: FeatureNorm},
    "vocab": {nn.Embedding: VocabEmbedding, Head: VocabHead},
    "stream": {
        Norm: _on_stream(WholeNorm),
        nn.Linear: _on_stream(WholeLinear),
        nn.Embedding: StreamEmbedding,
        Head: StreamHead,
        Mlp: lambda module, site: module,
    },
    "routed": {Router: WholeRouter},
    "whole": {Norm: _on_row(WholeNorm), nn.Linear: _on_row(WholeLinear), Attention: _whole, Mlp: _whole},
}
"""Style → type of module → what takes its place, made from the module and its `Site`."""
