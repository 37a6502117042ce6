"""What a ViT or DeiT says about images: logits, the tokens after every block, and what its attention computes with.

Tokens of a layer are (batch, other tokens + patches, hidden_size): the class token first, then DeiT's distillation
token if there is one, then the patches in raster order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DeiTConfig, PreTrainedModel, ViTConfig

from transmamba.errors import InputError
from transmamba.ops.precision import AUTOCAST_DEVICES


@dataclass(frozen=True)
class TeacherSignals:
    """One forward pass of a teacher.

    logits (batch, classes), or None without a head. tokens: the residual stream after each block. feature
    (batch, hidden_size): the class token after the final norm. queries, keys: of each block, (batch, tokens,
    hidden_size), where they were asked for. num_others: tokens before the patches. grid: of the patches.
    """

    logits: Tensor | None
    tokens: tuple[Tensor, ...]
    feature: Tensor
    num_others: int
    grid: tuple[int, int]
    num_heads: int
    queries: tuple[Tensor, ...] = ()
    keys: tuple[Tensor, ...] = ()


@dataclass
class _Seen:
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def keep(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self.outputs.setdefault(name, []).append(output[0] if isinstance(output, tuple) else output)

        return hook


@dataclass(frozen=True)
class _Network:
    """A model with the parts of it that are read. made_of: the weights, as they were when it was made."""

    model: Any
    blocks: list[Any]
    final_norm: nn.Module
    made_of: tuple[Any, ...] = ()

    @staticmethod
    def of(model: Any, made_of: tuple[Any, ...] = ()) -> "_Network":
        backbone = model.base_model
        return _Network(model, list(backbone.layers), backbone.layernorm, made_of)


class VisionTeacher:
    """A ViT or DeiT that runs beside the student, frozen. Under autocast a copy runs whose weights are cast already.

    Raises:
        InputError: it is of another family.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not isinstance(model.config, ViTConfig | DeiTConfig):
            raise InputError(f"{type(model).__name__} is no teacher of images; give a ViT or DeiT of transformers.")
        self.model = model.eval().requires_grad_(False)
        self.network = _Network.of(self.model)
        self.narrow: _Network | None = None
        self.num_labels = None if model.base_model is model else int(model.config.num_labels)

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def num_layers(self) -> int:
        return len(self.network.blocks)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of its images, (rows, columns)."""
        (height, width), (down, across) = (_pair(getattr(self.model.config, n)) for n in ("image_size", "patch_size"))
        return height // down, width // across

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, *, with_attention: bool = False) -> TeacherSignals:
        """Run on pixel_values (batch, channels, height, width), of its own size."""
        height, width = _pair(self.model.config.image_size)
        if tuple(pixel_values.shape[1:]) != (self.model.config.num_channels, height, width):
            raise InputError(
                f"the teacher reads images of {self.model.config.num_channels} x {height} x {width} and these are "
                f"{' x '.join(map(str, pixel_values.shape[1:]))}; set image_size to the teacher's."
            )
        seen, network = _Seen(), self._network(pixel_values.device.type)
        with _hooks(network, seen, with_attention):
            output = network.model(pixel_values=pixel_values)
        tokens = tuple(seen.outputs["block"])
        return TeacherSignals(
            logits=None if self.num_labels is None else output.logits,
            tokens=tokens,
            feature=seen.outputs["norm"][-1][:, 0],
            num_others=tokens[0].shape[1] - self.grid[0] * self.grid[1],
            grid=self.grid,
            num_heads=int(self.model.config.num_attention_heads),
            queries=tuple(seen.outputs.get("query", ())),
            keys=tuple(seen.outputs.get("key", ())),
        )

    def _network(self, device: str) -> _Network:
        """The model, or under autocast its copy with the values that autocast would give to every product."""
        if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
            return self.network
        dtype = torch.get_autocast_dtype(device)
        made_of = dtype, *((one.data_ptr(), one._version) for one in self.model.parameters())
        if self.narrow is None or self.narrow.made_of != made_of:
            copy = deepcopy(self.model)
            for module in copy.modules():
                if type(module) in (nn.Linear, nn.Conv2d):
                    module.to(dtype)
            self.narrow = _Network.of(copy, made_of)
            for block in self.narrow.blocks:  # its norms are read by products alone, one of them by three
                for module in block.modules():
                    if isinstance(module, nn.LayerNorm):
                        module.register_forward_hook(lambda _, __, output: output.to(dtype))
        return self.narrow


@contextmanager
def _hooks(network: _Network, seen: _Seen, with_attention: bool) -> Iterator[None]:
    handles: list[RemovableHandle] = [network.final_norm.register_forward_hook(seen.keep("norm"))]
    for block in network.blocks:
        handles.append(block.register_forward_hook(seen.keep("block")))
        if with_attention:
            handles.append(block.attention.q_proj.register_forward_hook(seen.keep("query")))
            handles.append(block.attention.k_proj.register_forward_hook(seen.keep("key")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
