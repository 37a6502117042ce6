"""The short causal convolution as a module that LoRA, quantisation and hooks understand: an nn.Conv1d."""

from torch import Tensor, nn

from transmamba.ops.causal_conv1d import depthwise_valid


class CausalConv1d(nn.Conv1d):
    """Depthwise convolution over inputs that already carry their past: (batch, channels, kernel - 1 + t) -> (batch,
    channels, t).

    With nn.Conv1d's own arguments, and its own forward where it is not depthwise: LoRA makes its two factors of this
    class.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.shape[1] != 1:
            return super().forward(input)
        return depthwise_valid(input.transpose(1, 2), self.weight[:, 0], self.bias).transpose(1, 2)
