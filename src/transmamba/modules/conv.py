"""The short causal convolution as a module that LoRA, quantisation and hooks understand: an nn.Conv1d."""

from typing import TypeGuard, TypeVar

from torch import Tensor, nn

from transmamba.ops.causal_conv1d import depthwise_valid

M = TypeVar("M", bound=nn.Module)


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


def is_plain(module: nn.Module | None, kind: type[M]) -> TypeGuard[M]:
    """Whether a module is exactly its class and weights, so that an op may compute what calling it would.

    Not so: adapters and parametrizations, which change its class; hooks, and a forward of its own, as accelerate sets
    it; weights of a subclass of Tensor, as quantisation leaves them.
    """
    if module is None or type(module) is not kind or "forward" in module.__dict__:
        return False
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        return False
    return all(weight is None or type(weight) in (Tensor, nn.Parameter) for weight in module._parameters.values())
