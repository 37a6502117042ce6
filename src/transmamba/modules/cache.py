"""One cache for both regimes: keys and values while a row is before a layer's TransPoint, a state after it.

Keys are stored rotated, as attention reads them; at the switch they are turned back (the rotation is orthogonal) and
become the state. Keys and values of a row are freed when it switches. Rows of a batch may stand at different positions
and in different modes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from transmamba.errors import CacheError
from transmamba.modules.static_cache import REWIND, StaticCache

BLOCK = 64  # tokens that storage grows by: copying it every 64 steps costs 2 % of reading it 64 times


class TransMambaLayerCache(CacheLayerMixin):
    """What one layer remembers of every row.

    keys, values (rows before the switch, capacity, num_key_value_heads, head_dim); dt (rows, capacity, state_heads),
    fp32, only where there is a TransPoint to come; state (batch, state_heads, state_size, head_dim), fp32; conv (batch,
    at least conv_kernel - 1, channels), the last inputs of the convolution.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, trans_point: int | None, conv_kernel: int) -> None:
        super().__init__()
        self.trans_point = trans_point
        self.conv_kernel = conv_kernel
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.dt: Tensor | None = None
        self.state: Tensor | None = None
        self.conv: Tensor | None = None
        self.kv_rows: list[int] = []
        self.kv_lengths: list[int] = []

    @property
    def has_switched(self) -> bool:
        """Whether any row of this layer has become a state."""
        return self.state is not None

    def tensors(self) -> list[Tensor]:
        """All that is stored now."""
        return [x for x in (self.keys, self.values, self.dt, self.state, self.conv) if x is not None]

    def append(
        self, rows: Sequence[int], lengths: Sequence[int], keys: Tensor, values: Tensor, dt: Tensor | None, batch: int
    ) -> None:
        """Add tokens to the given rows: keys and values (rows, max length, heads, head_dim), dt (rows, max length,
        heads), right padded.
        """
        if self.keys is None:
            self.kv_rows, self.kv_lengths = list(range(batch)), [0] * batch
        places = [self.kv_rows.index(row) for row in rows]
        needed = max(self.kv_lengths[place] + length for place, length in zip(places, lengths, strict=True))
        self.keys = _with_room(self.keys, keys, len(self.kv_rows), needed, self.trans_point)
        self.values = _with_room(self.values, values, len(self.kv_rows), needed, self.trans_point)
        stored = [(self.keys, keys), (self.values, values)]
        if dt is not None:
            self.dt = _with_room(self.dt, dt, len(self.kv_rows), needed, self.trans_point)
            stored.append((self.dt, dt))
        starts = {self.kv_lengths[place] for place in places}
        if places == list(range(len(self.kv_rows))) and len(starts) == 1 and len(set(lengths)) == 1:
            start = starts.pop()
            for store, new in stored:
                store[:, start : start + new.shape[1]] = new
        else:
            for i, (place, length) in enumerate(zip(places, lengths, strict=True)):
                start = self.kv_lengths[place]
                for store, new in stored:
                    store[place, start : start + length] = new[i, :length]
        for place, length in zip(places, lengths, strict=True):
            self.kv_lengths[place] += length

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None, list[int]]:
        """Keys, values, dt and lengths of the given rows, cut to the longest of them."""
        assert self.keys is not None
        assert self.values is not None
        places = [self.kv_rows.index(row) for row in rows]
        lengths = [self.kv_lengths[place] for place in places]
        longest = max(lengths)
        stores = (self.keys, self.values, self.dt)
        if places == list(range(len(self.kv_rows))):
            keys, values, dt = (None if x is None else x[:, :longest] for x in stores)
        else:
            index = torch.tensor(places, device=self.keys.device)
            keys, values, dt = (None if x is None else x[index, :longest] for x in stores)
        assert keys is not None
        assert values is not None
        return keys, values, dt, lengths

    def before_switch(self, rows: Sequence[int]) -> tuple[int, ...]:
        """Those of the rows that are still kept as keys and values."""
        return tuple(row for row in rows if row in self.kv_rows)

    def free(self, rows: Sequence[int]) -> None:
        """Drop keys and values of rows that have switched."""
        kept = [place for place, row in enumerate(self.kv_rows) if row not in set(rows)]
        self._select_kv(kept, [self.kv_rows[place] for place in kept])

    def store_state(self, rows: Sequence[int], state: Tensor, batch: int) -> None:
        """Set the state of the given rows, (rows, state_heads, state_size, head_dim)."""
        if len(rows) == batch:
            self.state = state
            return
        if self.state is None:
            self.state = state.new_zeros(batch, *state.shape[1:])
        self.state = self.state.index_copy(0, torch.tensor(rows, device=state.device), state)

    def select_rows(self, rows: list[int]) -> None:
        """Make row i what row rows[i] was; rows may repeat and be left out."""
        self.state, self.conv = (
            None if x is None else x[torch.tensor(rows, device=x.device)] for x in (self.state, self.conv)
        )
        place = {row: i for i, row in enumerate(self.kv_rows)}
        kept = [(i, place[row]) for i, row in enumerate(rows) if row in place]
        self._select_kv([old for _, old in kept], [new for new, _ in kept])

    def remove_last(self, count: int) -> None:
        """Forget the last `count` tokens of every row."""
        if self.conv is not None:
            self.conv = self.conv[:, : self.conv.shape[1] - count]
        self.kv_lengths = [length - count for length in self.kv_lengths]

    def reset(self) -> None:
        self.keys = self.values = self.dt = self.state = self.conv = None
        self.kv_rows, self.kv_lengths = [], []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_rows(beam_idx.tolist())

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise CacheError("TransMambaCache is filled by TransMamba's own layers.")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise CacheError("TransMambaCache is filled by TransMamba's own layers.")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return max(self.kv_lengths, default=0)

    def get_max_cache_shape(self) -> int:
        return -1

    def get_max_length(self) -> int:
        return -1

    def _select_kv(self, places: list[int], rows: list[int]) -> None:
        if not places:
            self.keys = self.values = self.dt = None
        elif self.keys is not None:
            index = torch.tensor(places, device=self.keys.device)
            self.keys, self.values, self.dt = (
                None if x is None else x[index] for x in (self.keys, self.values, self.dt)
            )
        self.kv_lengths = [self.kv_lengths[place] for place in places]
        self.kv_rows = rows


class TransMambaCache(Cache):
    """The cache of a whole model, made for one schedule; rows know their own positions.

    trans_points: the schedule. conv_kernels: kernel of each layer's convolution, 0 = none.
    """

    def __init__(self, trans_points: Sequence[int | None], conv_kernels: Sequence[int]) -> None:
        self._static: StaticCache | None = None
        layers = [TransMambaLayerCache(point, kernel) for point, kernel in zip(trans_points, conv_kernels, strict=True)]
        super().__init__(layers=layers)
        self.trans_points = list(trans_points)
        self.lengths: list[int] | None = None  # tokens of each row, padding not counted
        self.columns = 0  # columns of the batch so far, padding counted
        self.planned_length: int | None = None  # tokens a row will have at most, where generation has said so

    @property
    def layers(self) -> list[TransMambaLayerCache]:
        """What each layer remembers; while decoding runs at fixed addresses, copies are made of what lies there."""
        self.leave_static()
        return self._layers

    @layers.setter
    def layers(self, layers: list[TransMambaLayerCache]) -> None:
        self._layers = layers

    def enter_static(self, static: StaticCache) -> None:
        """Live at fixed addresses from now on, until something is asked that needs storage of its own."""
        if self._static is not static:
            static.load(self)
            self._static = static

    def leave_static(self) -> None:
        """Go back to storage of its own, which can grow."""
        static, self._static = self._static, None
        if static is not None:
            static.unload(self)

    def __getstate__(self) -> dict[str, Any]:
        self.leave_static()  # copies and pickles are of what is stored, not of where
        return self.__dict__

    @property
    def rewind(self) -> int:
        """Tokens for which crop needs the convolution's old inputs: none where a layer has switched, or will with the
        first token.
        """
        return REWIND if self.is_croppable and 0 not in self.trans_points else 0

    def pasts(self, batch: int) -> list[int]:
        """Tokens before this call, per row."""
        if self.lengths is None:
            self.lengths = [0] * batch
        if len(self.lengths) != batch:
            raise CacheError(
                f"the cache holds {len(self.lengths)} rows and the batch has {batch}; use one cache per batch."
            )
        return self.lengths

    def advance(self, lengths: Sequence[int], columns: int) -> None:
        """Count tokens that every layer has now seen."""
        assert self.lengths is not None
        self.lengths = [past + new for past, new in zip(self.lengths, lengths, strict=True)]
        self.columns += columns

    def memory_bytes(self) -> int:
        """Bytes of everything stored, unused room included."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.tensors())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included, as generation counts them."""
        return self.columns

    def select_rows(self, rows: Sequence[int]) -> None:
        """Make row i what row rows[i] was, in every layer."""
        rows = list(rows)
        if self.lengths is not None:
            self.lengths = [self.lengths[row] for row in rows]
        for layer in self.layers:
            layer.select_rows(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i goes on from row beam_idx[i]."""
        self.select_rows(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        self.select_rows(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times in place."""
        self.select_rows([row for row in range(len(self.lengths or [])) for _ in range(repeats)])

    def reset(self) -> None:
        """Forget everything; the schedule stays."""
        self._static = None
        self.lengths, self.columns = None, 0
        for layer in self.layers:
            layer.reset()

    def crop(self, max_length: int) -> None:
        """Keep the first max_length tokens, or take back that many where it is negative.

        Refused, with the reason, where the past is gone.
        """
        count = -max_length if max_length < 0 else self.columns - max_length
        if count <= 0:
            return
        if self.lengths is None or count > min(self.lengths):
            raise CacheError(f"cannot take back {count} tokens: the shortest row has {min(self.lengths or [0])}.")
        for number, layer in enumerate(self.layers):
            if layer.has_switched:
                raise CacheError(
                    f"cannot take back {count} tokens: layer {number} has switched at TransPoint {layer.trans_point}, "
                    "and a state cannot be rewound. Keep a copy of the cache (copy.deepcopy) before such tokens."
                )
            if layer.conv is not None and layer.conv.shape[1] - count < layer.conv_kernel - 1:
                room = layer.conv.shape[1] - layer.conv_kernel + 1
                raise CacheError(
                    f"cannot take back {count} tokens: layer {number} keeps the convolution's inputs for {room}. "
                    "Keep a copy of the cache (copy.deepcopy) instead."
                )
        self.lengths = [length - count for length in self.lengths]
        for layer in self.layers:
            if any(self.lengths):
                layer.remove_last(count)
            else:  # the next call begins a document, and expects nothing stored
                layer.reset()
        self.columns -= count

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.lengths is not None

    @property
    def is_croppable(self) -> bool:
        return not any(layer.has_switched for layer in self.layers)


def _with_room(store: Tensor | None, new: Tensor, rows: int, needed: int, trans_point: int | None) -> Tensor:
    """Storage for `needed` tokens, with what was stored.

    A copy where gradients flow, since it is then written in place.
    """
    tracked = torch.is_grad_enabled() and (new.requires_grad or (store is not None and store.requires_grad))
    if store is not None and store.shape[1] >= needed:
        return store.clone() if tracked else store
    capacity = -(-needed // BLOCK) * BLOCK
    capacity = capacity if trans_point is None else min(capacity, trans_point)
    grown = new.new_zeros(rows, capacity, *new.shape[2:])
    if store is not None:
        grown[:, : store.shape[1]] = store
    return grown
