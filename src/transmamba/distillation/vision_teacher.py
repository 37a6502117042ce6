"""What a ViT or DeiT says about images: logits, the tokens after every block, and what its attention computes with.

Tokens of a layer are (batch, other tokens + patches, hidden_size): the class token first, then DeiT's distillation
token if there is one, then the patches in raster order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DeiTConfig, PreTrainedModel, ViTConfig

from transmamba.errors import InputError


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


class VisionTeacher:
    """A ViT or DeiT that runs beside the student, frozen.

    Raises:
        InputError: it is of another family.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not isinstance(model.config, ViTConfig | DeiTConfig):
            raise InputError(f"{type(model).__name__} is no teacher of images; give a ViT or DeiT of transformers.")
        self.model = model.eval().requires_grad_(False)
        backbone: Any = model.base_model
        self.blocks: list[Any] = list(backbone.layers)
        self.final_norm: nn.Module = backbone.layernorm
        self.num_labels = None if model.base_model is model else int(model.config.num_labels)

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

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
        seen = _Seen()
        with self._hooks(seen, with_attention):
            output = self.model(pixel_values=pixel_values)
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

    @contextmanager
    def _hooks(self, seen: _Seen, with_attention: bool) -> Iterator[None]:
        handles: list[RemovableHandle] = [self.final_norm.register_forward_hook(seen.keep("norm"))]
        for block in self.blocks:
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
