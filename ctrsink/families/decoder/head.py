"""From the state at a target to the logit of a click."""

import math

import torch
from torch import nn
from torch.nn import functional

STATE_WIDTH = 32


class WideLinear(nn.Linear):
    """Computes in fp32, whatever its weights are held in."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(input, self.weight.float(), None if self.bias is None else self.bias.float())


class WideNorm(nn.LayerNorm):
    """Computes in fp32, whatever its weights are held in."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(input, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class ClickHead(nn.Module):
    """Layer norm and a linear map to one logit."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = WideNorm(hidden_size)
        self.linear = WideLinear(hidden_size, 1)

    def forward(self, states: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T]; `numbers` are not read."""
        return self.linear(self.norm(states)).squeeze(-1)


class LinearHead(nn.Module):
    """A linear map to one logit, without a constant: the `score` of transformers' sequence classification."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = WideLinear(hidden_size, 1, bias=False)

    def forward(self, states: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T]; `numbers` are not read."""
        return self.linear(states).squeeze(-1)


class JointHead(nn.Module):
    """`MLP([numbers, W LN(state)])`: what is known of the target beside what the language model makes of its history.

    The state comes in through a narrow and small W, so that the numbers are not drowned in it at the start.

    Args:
        numbers: z-scores of a target.
        dropout: share of the inner activations that is dropped in training.
    """

    def __init__(self, hidden_size: int, numbers: int, dropout: float) -> None:
        super().__init__()
        self.norm = WideNorm(hidden_size)
        self.project = WideLinear(hidden_size, STATE_WIDTH)
        nn.init.normal_(self.project.weight, std=0.1 / math.sqrt(hidden_size))
        nn.init.zeros_(self.project.bias)
        self.layers = nn.Sequential(
            WideLinear(numbers + STATE_WIDTH, 64),
            nn.GELU(),
            nn.Dropout(dropout),
            WideLinear(64, 32),
            nn.GELU(),
            nn.Dropout(dropout),
            WideLinear(32, 1),
        )

    def forward(self, states: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """States [B, T, D] and z-scores [B, T, G] -> [B, T]."""
        return self.layers(torch.cat([numbers, self.project(self.norm(states))], -1)).squeeze(-1)
