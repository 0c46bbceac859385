"""The gated MLP of a block, or the shared expert of a mixture."""

from torch import Tensor, nn


class Mlp(nn.Module):
    """down(activation(gate(x)) · up(x)) from D to `size` and back."""

    def __init__(self, hidden_size: int, size: int, activation: str, *, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, size, bias=bias)
        self.down_proj = nn.Linear(size, hidden_size, bias=bias)
        self.activation = activation

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(activate(self.gate_proj(x_TD), self.activation) * self.up_proj(x_TD))


def activate(x: Tensor, name: str) -> Tensor:
    return nn.functional.silu(x) if name == "silu" else nn.functional.gelu(x, approximate="tanh")
