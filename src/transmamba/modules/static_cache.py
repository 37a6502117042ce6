"""The cache at fixed addresses, for decode steps that are recorded once and replayed.

Every row has its place, its position lies on the device, and what a layer stores has the same shape at every step: keys
and values for min(TransPoint, capacity) positions, a state where there is a TransPoint, and a ring of the convolution's
last inputs, in which position t lies at t modulo its size.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transmamba.modules.cache import TransMambaCache, TransMambaLayerCache
    from transmamba.modules.mixer import MixerConfig

REWIND = 32  # tokens that crop can take back where the convolution's inputs have to be kept for it


class LayerMode(Enum):
    """What a layer does in one step: attention for all rows, the state space for all, or each row its own."""

    ATTENTION = "attention"
    MIXED = "mixed"
    SSM = "ssm"


def layer_mode(trans_point: int | None, positions: Sequence[int]) -> LayerMode:
    """The mode of a layer whose rows read their tokens at these positions now."""
    if trans_point is None or max(positions) < trans_point:
        return LayerMode.ATTENTION
    return LayerMode.SSM if min(positions) >= trans_point else LayerMode.MIXED


@dataclass(frozen=True, kw_only=True)
class StaticLayer:
    """What one layer stores; None where it never does.

    keys, values (rows, places, num_key_value_heads, head_dim), keys rotated as attention reads them; dt (rows, places,
    state_heads), fp32; state (rows, state_heads, state_size, head_dim), fp32; conv (rows, slots, channels).
    """

    trans_point: int | None
    keys: Tensor | None
    values: Tensor | None
    dt: Tensor | None
    state: Tensor | None
    conv: Tensor | None

    @staticmethod
    def make(
        config: "MixerConfig",
        trans_point: int | None,
        rows: int,
        capacity: int,
        rewind: int,
        shortest: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "StaticLayer":
        c = config
        places = capacity if trans_point is None else min(trans_point, capacity)
        if trans_point is not None and trans_point < shortest:  # every row is a state already
            places = 0
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        heads, size = c.num_key_value_heads, c.head_dim
        channels = (c.num_attention_heads + 2 * heads) * size
        return StaticLayer(
            trans_point=trans_point,
            keys=zeros(places, heads, size) if places else None,
            values=zeros(places, heads, size) if places else None,
            dt=zeros(places, c.num_state_heads, dtype=wide) if places and trans_point is not None else None,
            state=zeros(c.num_state_heads, size, size, dtype=wide)
            if trans_point is not None and trans_point < capacity
            else None,
            conv=zeros(c.conv_kernel + rewind, channels) if c.conv_kernel else None,
        )

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.keys, self.values, self.dt, self.state, self.conv) if x is not None]

    def crossing(self, positions: Sequence[int]) -> list[int]:
        """Rows whose next token is the first that the state space reads; their keys have to become a state before."""
        return [row for row, position in enumerate(positions) if position == self.trans_point and position > 0]

    def load(self, layer: "TransMambaLayerCache", lengths: Sequence[int]) -> None:
        """Take over what the growing cache of this layer holds, and free it there."""
        for x in self.tensors():
            x.zero_()
        if layer.keys is not None:
            longest = max(layer.kv_lengths)
            place = torch.tensor(layer.kv_rows, device=layer.keys.device)
            for mine, given in ((self.keys, layer.keys), (self.values, layer.values), (self.dt, layer.dt)):
                if mine is not None and given is not None:
                    mine[place, :longest] = given[:, :longest].to(mine.dtype)
        if layer.state is not None and self.state is not None:
            self.state[: len(lengths)] = layer.state
        if layer.conv is not None and self.conv is not None:
            count = min(layer.conv.shape[1], self.conv.shape[1] - 1)
            self.conv[: len(lengths)].scatter_(
                1, self._slots(lengths, count, layer.conv.shape[2]), layer.conv[:, -count:].to(self.conv.dtype)
            )
        layer.reset()

    def unload(self, layer: "TransMambaLayerCache", lengths: Sequence[int]) -> None:
        """Give a growing cache copies of what is here."""
        layer.reset()
        batch, point = len(lengths), self.trans_point
        before = [row for row, length in enumerate(lengths) if point is None or 0 < length <= point]
        if self.keys is not None and self.values is not None and before:
            layer.kv_rows, layer.kv_lengths = before, [lengths[row] for row in before]
            longest = max(layer.kv_lengths)
            index = torch.tensor(before, device=self.keys.device)
            layer.keys, layer.values = self.keys[index, :longest], self.values[index, :longest]
            layer.dt = None if self.dt is None else self.dt[index, :longest]
        if self.state is not None and point is not None and any(length > point for length in lengths):
            layer.state = self.state[:batch].clone()
        if self.conv is not None:
            kernel = layer.conv_kernel
            count = kernel - 1 + min(self.conv.shape[1] - kernel, *lengths)
            layer.conv = self.conv[:batch].gather(1, self._slots(lengths, count, self.conv.shape[2]))

    def _slots(self, lengths: Sequence[int], count: int, channels: int) -> Tensor:
        """Where the last `count` inputs of each row lie in the ring, (rows, count, channels)."""
        assert self.conv is not None
        ends = torch.tensor(lengths, device=self.conv.device)[:, None]
        places = (ends - count + torch.arange(count, device=self.conv.device)) % self.conv.shape[1]
        return places[..., None].expand(-1, -1, channels)


class StaticCache:
    """Storage of a whole model for `rows` rows of up to `capacity` tokens; one TransMambaCache at a time lives in it.

    positions: (rows,), the position of each row's next token, on the device; lengths: the same on the host, which knows
    them without asking. Rows beyond the batch are copies of nothing that stand where row 0 stands.
    shortest: no row has fewer tokens, so layers whose TransPoint lies below it store no keys and values.
    """

    def __init__(
        self,
        configs: Sequence["MixerConfig"],
        trans_points: Sequence[int | None],
        *,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        shortest: int = 0,
    ) -> None:
        rewind = 0 if 0 in trans_points else REWIND
        self.layers = [
            StaticLayer.make(config, point, rows, capacity, rewind, shortest, dtype, device)
            for config, point in zip(configs, trans_points, strict=True)
        ]
        self.rows, self.capacity, self.shortest = rows, capacity, shortest
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lengths = [0] * rows
        self._holder: weakref.ref[TransMambaCache] | None = None

    def memory_bytes(self) -> int:
        """Bytes of everything stored."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.tensors())

    def holder(self) -> "TransMambaCache | None":
        """The cache that lives here now."""
        return None if self._holder is None else self._holder()

    def load(self, cache: "TransMambaCache") -> None:
        """Move a cache in; the one that lived here goes back to storage of its own."""
        before = self.holder()
        if before is not None:
            before.leave_static()
        assert cache.lengths is not None
        for mine, given in zip(self.layers, cache.layers, strict=True):
            mine.load(given, cache.lengths)
        self.place(cache.lengths)
        self._holder = weakref.ref(cache)

    def place(self, lengths: Sequence[int]) -> None:
        """Set the positions of the rows, those beyond the batch like row 0."""
        self.lengths = [*lengths, *[lengths[0]] * (self.rows - len(lengths))]
        self.positions.copy_(torch.tensor(self.lengths))

    def unload(self, cache: "TransMambaCache") -> None:
        """Move the cache out again."""
        assert cache.lengths is not None
        self._holder = None
        for mine, given in zip(self.layers, cache.layers, strict=True):
            mine.unload(given, cache.lengths)

    def advance(self) -> None:
        """Count one token of every row, on the host; the step counts on the device."""
        self.lengths = [length + 1 for length in self.lengths]
