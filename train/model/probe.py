"""A look at the kernel of the experts before it trains anything: does it give what one expert after the other gives?

What torch runs for all groups at once hangs on its version and on the GPU, and where groups are empty or rows belong to
none it has been wrong on some (pytorch issues 172439 and 193633): no loss curve shows it. A few rows do, in
milliseconds.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from train.model.config import ModelConfig
from train.model.experts import EXPERTS, PROJECTIONS, Experts, has_kernel
from train.model.rows import Rows

D, F, E = 64, 32, 4
BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Of ‖Δ‖/‖result‖ of each token and of each expert; gradients are rounded more often and may be twice as far off."""


def check_experts(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Compare the kernel with one expert after the other in float32 on the CPU, forward and backward: where an expert
    has no rows, with rows of padding that hold NaN, and where there are no rows at all. Nothing to do where the model
    has no experts, or no kernel takes them.

    Raises: ValueError when a result lies further off than rounding can explain, or when the kernel refuses.
    """
    sizes = config.moe and torch.empty(0, config.moe.intermediate_size, config.hidden_size, device="meta")
    if sizes is None or not has_kernel(torch.empty(0, config.hidden_size, dtype=dtype, device=device), sizes):
        return
    generator = torch.Generator().manual_seed(0)
    # A limit out of reach: whether a value at its limit has a gradient hangs on how it was rounded.
    limit = None if config.moe.swiglu_limit is None else 100.0
    moe = replace(config.moe, num_experts=E, intermediate_size=F, swiglu_limit=limit)
    experts = Experts(D, moe, config.activation)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).div(D**0.5).to(dtype)
    plain, experts = copy.deepcopy(experts).float(), experts.to(device)
    # Expert 1 is chosen by none, the third token is padding.
    some = torch.tensor([(0, 2), (3, 2), (E, E), (2, 0)] + [(3, 0), (2, 3)] * 4)
    for case, chosen_TK in (("", some), (" without rows", some[:0])):
        x_TD, grad_TD = (torch.randn(len(chosen_TK), D, generator=generator).to(dtype) for _ in range(2))
        x_TD[2:3] = grad_TD[2:3] = torch.nan
        where = (
            f"torch {torch.__version__} computes experts{case} in {str(dtype)[6:]} on {device} "
            f"({torch.cuda.get_device_name(device) if device.type == 'cuda' else 'no GPU'})"
        )
        try:
            got = _with_kernel(experts, x_TD.to(device), grad_TD.to(device), chosen_TK.to(device))
        except RuntimeError as error:
            said = str(error).partition("\n")[0]
            raise ValueError(f"{where} with an error ({said}); take another version of torch") from error
        wanted = _one_by_one(plain, x_TD.float(), grad_TD.float(), chosen_TK)
        for i, name in enumerate(wanted):
            difference = (got[name].cpu().float() - wanted[name]).flatten(1).norm(dim=1)
            bound = BOUND[dtype] * (2 if i else 1) * wanted[name].flatten(1).norm(dim=1)
            if not (difference <= bound).all():  # 0 where nothing was to come, and NaN nowhere
                raise ValueError(
                    f"{where} wrongly: {name} is not that of one expert at a time; take another version of torch"
                )


def _with_kernel(experts: Experts, x_TD: Tensor, grad_TD: Tensor, chosen_TK: Tensor) -> dict[str, Tensor]:
    x_TD = x_TD.detach().requires_grad_()
    return _results(experts, x_TD, experts(x_TD, None, Rows.sort(chosen_TK, E)), grad_TD)


def _one_by_one(experts: Experts, x_TD: Tensor, grad_TD: Tensor, chosen_TK: Tensor) -> dict[str, Tensor]:
    x_TD = x_TD.detach().requires_grad_()
    rows = Rows.sort(chosen_TK, E)
    projections = (getattr(experts, name + kind) for kind in ("", "_bias") for name in PROJECTIONS)
    gating = experts.gating.activation, experts.gating.limit, experts.gating.alpha
    return _results(experts, x_TD, EXPERTS(x_TD, None, *projections, rows.token, rows.ends, *gating)[0], grad_TD)


def _results(experts: Experts, x_TD: Tensor, out_TD: Tensor, grad_TD: Tensor) -> dict[str, Tensor]:
    """The result, and all gradients."""
    leaves = {"x": x_TD, **dict(experts.named_parameters())}
    grads = torch.autograd.grad(out_TD, list(leaves.values()), grad_TD)
    return {"result": out_TD.detach()} | {f"the gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}
