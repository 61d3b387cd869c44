"""What a skipped sublayer adds to the residual stream in place of its own output (design section 2, version 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .gate import apply_patch


class _Matrix(nn.Module):
    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns, dtype=dtype), requires_grad=False)


class Patch(nn.Module):
    """`P(x) = U (D x) + b`; `bias` `[hidden]`, `down.weight` `[rank, hidden]`, `up.weight` `[hidden, rank]`."""

    def __init__(self, hidden_size: int, rank: int, dtype: torch.dtype, scale: float = 1.0) -> None:
        """scale: of what is returned, where the model multiplies it again before it is added to the residual."""
        super().__init__()
        self.scale = scale
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=dtype), requires_grad=False)
        self.down = _Matrix(rank, hidden_size, dtype) if rank else None
        self.up = _Matrix(hidden_size, rank, dtype) if rank else None

    def forward(self, x: Tensor) -> Tensor:
        """x: `[rows, hidden]`, the sublayer's normed input. Returns the same shape."""
        if self.down is None or self.up is None:
            patch = apply_patch(x, self.bias)
        else:
            patch = apply_patch(x, self.bias, self.down.weight, self.up.weight)
        return patch if self.scale == 1.0 else patch * self.scale
