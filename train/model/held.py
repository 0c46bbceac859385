"""What a rank holds of a parameter."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def held(parameter: Tensor | None) -> Tensor | None:
    """The local part of a parameter that is cut over ranks (experts, heads), for modules that work on their part alone;
    in backward its gradient is that part's."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
