"""The short causal convolution as a module that LoRA, quantisation and hooks understand: an nn.Conv1d."""

from torch import Tensor, nn

from transmamba.ops.causal_conv1d import depthwise_valid


class CausalConv1d(nn.Conv1d):
    """Depthwise convolution over inputs that already carry their past: (batch, channels, kernel - 1 + t) -> (batch, channels, t)."""

    def __init__(self, channels: int, kernel: int, *, bias: bool = True) -> None:
        super().__init__(channels, channels, kernel, groups=channels, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        return depthwise_valid(input.transpose(1, 2), self.weight[:, 0], self.bias).transpose(1, 2)
