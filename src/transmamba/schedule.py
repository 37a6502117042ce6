"""TransPoint schedules: at which position each layer changes from attention to the state space, and what that costs.

A TransPoint P is a position within a document: tokens before P are mixed by causal softmax attention, tokens from P
on by the SSM, which starts from the state that the prefix leaves behind. P = 0 is a Mamba-2 layer, None never switches.
A schedule has one TransPoint per layer. This file is pure Python; nothing here needs torch.

Costs are counts of matrix products, a multiply-add being two FLOPs; element-wise work (norms, softmax, activations,
decays) is left out. `layer_flops` is the whole cost model. Letters: d hidden_size, n state_size, p head_dim,
Q chunk_size, P TransPoint.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import cycle, islice
from numbers import Integral
from typing import Any, Literal, Self

from transmamba.errors import InputError, ScheduleError

__all__ = ["LayerFlops", "MixerShape", "ScheduleCost", "ScheduleRow", "TransPointSchedule", "layer_flops"]

Mode = Literal["attention", "ssm"]

PUBLISHED_SEQ_LEN = 8192  # the length for which the TransMamba paper gives its schedules, arXiv 2503.24067, table 6

# Layer i takes entry i modulo the length of the cycle. These do not depend on the sequence length.
BASELINE_CYCLES: dict[str, tuple[int | None, ...]] = {
    "transformer": (None,),
    "mamba2": (0,),
    "hybrid-1-1": (0, None),
    "hybrid-1-7": (0, 0, 0, 0, None, 0, 0, 0),  # Jamba's order, arXiv 2403.19887: attention at index 4 of 8
}

# Scaled by seq_len / PUBLISHED_SEQ_LEN.
PUBLISHED_CYCLES: dict[str, tuple[int, ...]] = {
    "v1": (2048,),
    "v2": (4096,),
    "v3": (6144,),
    "v4": (3072, 4096, 5120),
    "v5": (2048, 3072, 4096),
    "v6": (512, 1024, 2048),
    "v7": (2048, 4096, 6144),
    "v8": (0, 1024, 2048, 6144, 8192),
    "v9": (0, 128, 256, 512, 1024, 2048, 4096, 8192),
}


class TransPointSchedule(tuple[int | None, ...]):
    """One TransPoint per layer: a position >= 0, or None for a layer that never switches.

    Immutable, hashable, and equal to a list or tuple with the same entries. A slice is a plain tuple.
    """

    __slots__ = ()

    def __new__(cls, entries: Iterable[int | None]) -> Self:
        if isinstance(entries, TransPointSchedule):
            return super().__new__(cls, entries)
        if isinstance(entries, str):
            raise ScheduleError(
                f"A schedule is a list with an entry per layer, not the text {entries!r}; for a name or a written list "
                "use TransPointSchedule.parse(text, num_layers, seq_len)."
            )
        if isinstance(entries, Mapping) or not isinstance(entries, Iterable):
            raise ScheduleError(f"A schedule is a list with an entry per layer, not {entries!r}.")
        checked = tuple(_check_entry(layer, entry) for layer, entry in enumerate(entries))
        if not checked:
            raise ScheduleError("A schedule needs at least one layer and has none.")
        return super().__new__(cls, checked)

    @classmethod
    def named(cls, name: str, num_layers: int, seq_len: int = PUBLISHED_SEQ_LEN) -> Self:
        """The known schedule for a model of `num_layers` layers, trained at `seq_len` tokens.

        "transformer", "mamba2", "hybrid-1-1" and "hybrid-1-7" are the same at every length; "v1" to "v9" were published
        for 8192 tokens and are scaled to `seq_len`, rounding halves up. Layers beyond the cycle start it again.
        """
        _check_count("num_layers", num_layers)
        _check_count("seq_len", seq_len)
        known = cls.names()
        key = name.strip().lower() if isinstance(name, str) else name
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ScheduleError(f"There is no schedule named {name!r}.{hint} Known: {', '.join(known)}.")
        if key in BASELINE_CYCLES:
            entries: Sequence[int | None] = BASELINE_CYCLES[key]
        else:
            entries = _scaled_cycle(key, seq_len)
        return cls(islice(cycle(entries), num_layers))

    @classmethod
    def parse(cls, text: str, num_layers: int, seq_len: int = PUBLISHED_SEQ_LEN) -> Self:
        """The schedule written as a name, or as a list such as "0,128,none".

        "none" is a layer that never switches. A list that ends in "..." is repeated over the layers: "0,none,...".
        """
        _check_count("num_layers", num_layers)
        if not isinstance(text, str):
            raise ScheduleError(f"Expected the text of a schedule, not {text!r}.")
        words = [word.strip().lower() for word in text.split(",")]
        if words[-1] == "..." and len(words) > 1:
            return cls(islice(cycle(_parse_entry(layer, word) for layer, word in enumerate(words[:-1])), num_layers))
        if len(words) == 1 and not _is_entry(words[0]):
            return cls.named(words[0], num_layers, seq_len)
        return cls(_parse_entry(layer, word) for layer, word in enumerate(words)).check_num_layers(num_layers)

    @staticmethod
    def names() -> list[str]:
        """Every name that `named` knows, baselines first."""
        return [*BASELINE_CYCLES, *PUBLISHED_CYCLES]

    def to_list(self) -> list[int | None]:
        """The entries as a plain list, as they are written to config.json."""
        return list(self)

    def check_num_layers(self, num_layers: int) -> Self:
        """The schedule itself, if it has an entry for each of `num_layers` layers."""
        if len(self) != num_layers:
            raise ScheduleError(
                f"The schedule has {len(self)} entries and the model {num_layers} layers; give one entry per layer, "
                f"or a name ({', '.join(self.names())})."
            )
        return self

    def modes_at(self, position: int) -> tuple[Mode, ...]:
        """What mixes the token at `position`, per layer: "attention" before the TransPoint, "ssm" from it on."""
        _check_position(position)
        return tuple("attention" if entry is None or position < entry else "ssm" for entry in self)

    def stays_attention_from(self, seq_len: int) -> Self:
        """The schedule with every entry >= `seq_len` made None.

        Layers that do not switch within the training length have never run their SSM; past that length they must go on
        as attention rather than switch into untrained parameters.
        """
        _check_count("seq_len", seq_len)
        return type(self)(None if entry is None or entry >= seq_len else entry for entry in self)

    def partway(self, seq_len: int, share: float | Sequence[float]) -> Self:
        """The schedule this far on the way from attention throughout, at share 0, to this one, at share 1.

        On the way, P + 1 moves by equal factors from `seq_len` + 1 to its place, and stands at the next of two lengths
        to an octave, so that few lengths occur. A layer that never switches within `seq_len` is None throughout.
        share: between 0 and 1, one for all layers or one for each.
        """
        _check_count("seq_len", seq_len)
        shares = [share] * len(self) if isinstance(share, int | float) else list(share)
        if len(shares) != len(self) or not all(0 <= one <= 1 for one in shares):
            raise ScheduleError(f"share={share!r} must be a number from 0 to 1, or {len(self)} of them, one per layer.")
        entries: list[int | None] = []
        for entry, one in zip(self, shares, strict=True):
            place = _on_the_way(None, entry, one, seq_len)
            if place is None or place >= seq_len or one == 1:
                entries.append(place)
            else:
                step = 1 << max(0, place.bit_length() - 2)
                entries.append(-(-place // step) * step)
        return type(self)(entries).stays_attention_from(seq_len)

    def segments(self, seq_len: int) -> list[tuple[int, int]]:
        """The stretches (start, end) of [0, seq_len) within which no layer switches."""
        _check_count("seq_len", seq_len)
        inner = sorted({entry for entry in self if entry is not None and 0 < entry < seq_len})
        return list(zip([0, *inner], [*inner, seq_len], strict=True))

    def attention_share(self, seq_len: int) -> float:
        """The share of layer-tokens that attention mixes, between 0 and 1, in a document of `seq_len` tokens."""
        _check_count("seq_len", seq_len)
        return sum(_attention_tokens(entry, seq_len) for entry in self) / (len(self) * seq_len)

    def between(self, other: Iterable[int | None], count: int, seq_len: int) -> list[Self]:
        """`count` schedules from this one to `other`, both included, for documents of `seq_len` tokens.

        Every layer's P + 1 grows or shrinks by one factor at every step, a layer that never switches counting as
        P = `seq_len`. The two ends stay as they are.
        """
        _check_count("seq_len", seq_len)
        _check_count("count", count)
        end = type(self)(other).check_num_layers(len(self))
        if count == 1:
            if self != end:
                raise ScheduleError("count=1 has no room for two schedules that differ; ask for 2 or more.")
            return [self]
        steps = [
            type(self)(_on_the_way(a, b, number / (count - 1), seq_len) for a, b in zip(self, end, strict=True))
            for number in range(1, count - 1)
        ]
        return [self, *steps, end]

    def kv_tokens(self, position: int) -> tuple[int, ...]:
        """How many tokens' keys and values each layer holds once `position` tokens have been read."""
        return tuple(position if mode == "attention" else 0 for mode in self.modes_at(position))

    def cost(self, shape: "MixerShape", seq_len: int) -> "ScheduleCost":
        """What a forward pass over `seq_len` tokens costs, and decoding and the cache at any position."""
        _check_count("seq_len", seq_len)
        return ScheduleCost(schedule=self, shape=shape, seq_len=seq_len)

    def table(self, shape: "MixerShape", *, positions: Sequence[int], lengths: Sequence[int]) -> list["ScheduleRow"]:
        """A row per layer: its mode at each of `positions`, and its cache bytes after each of `lengths` tokens."""
        modes = [self.modes_at(position) for position in positions]
        caches = [[_layer_cache_bytes(shape, entry, length) for entry in self] for length in lengths]
        return [
            ScheduleRow(
                layer=layer,
                trans_point=entry,
                modes=tuple(column[layer] for column in modes),
                cache_bytes=tuple(column[layer] for column in caches),
            )
            for layer, entry in enumerate(self)
        ]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, list | tuple):
            return tuple(self) == tuple(other)
        return NotImplemented

    # tuple defines __ne__ itself, so it does not follow __eq__.
    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__

    def __repr__(self) -> str:
        return f"TransPointSchedule({list(self)})"

    def __str__(self) -> str:
        return ",".join("none" if entry is None else str(entry) for entry in self)


@dataclass(frozen=True, kw_only=True, slots=True)
class MixerShape:
    """The sizes on which costs depend; the names are those of TransMambaConfig.

    Keys and values have num_key_value_heads heads, step sizes num_state_heads; both divide num_attention_heads, and one
    divides the other. The state has as many heads as the larger of the two. In the "standard" form, layers that never
    switch have no convolution.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_state_heads: int
    head_dim: int
    vocab_size: int
    conv_kernel: int = 4
    use_gate: bool = True
    mixer_form: str = "shared"
    chunk_size: int = 64
    bytes_per_element: int = 2
    state_bytes_per_element: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "mixer_form":
                if value not in ("shared", "standard"):
                    raise InputError(f'mixer_form={value!r} must be "shared" or "standard".')
                continue
            if field.name == "use_gate":
                if not isinstance(value, bool):
                    raise InputError(f"use_gate={value!r} must be True or False.")
                continue
            least = 0 if field.name in ("conv_kernel", "intermediate_size") else 1
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise InputError(f"{field.name}={value!r} must be a whole number >= {least}.")
        for name in ("num_key_value_heads", "num_state_heads"):
            count = getattr(self, name)
            if self.num_attention_heads % count:
                raise InputError(f"{name}={count} must divide num_attention_heads={self.num_attention_heads}.")
        if self.state_heads % min(self.num_key_value_heads, self.num_state_heads):
            raise InputError(
                f"num_state_heads={self.num_state_heads} must be a multiple or a divisor of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, bytes_per_element: int = 2) -> Self:
        """The shape of the model that a config.json describes (`json.load`, or `config.to_dict()`)."""
        not_of_the_model = {"chunk_size", "bytes_per_element", "state_bytes_per_element"}
        names = [field.name for field in fields(cls) if field.name not in not_of_the_model]
        missing = [name for name in names if name not in config]
        if missing:
            raise InputError(f"The config has no {', '.join(missing)}; is it that of a transmamba model?")
        return cls(**{name: config[name] for name in names}, bytes_per_element=bytes_per_element)

    @property
    def state_size(self) -> int:
        """Rows of the state: the width of a query or key head, since these are also C and B."""
        return self.head_dim

    @property
    def state_heads(self) -> int:
        return max(self.num_key_value_heads, self.num_state_heads)

    @property
    def conv_channels(self) -> int:
        """Channels that the convolution runs over: queries, keys and values."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFlops:
    """FLOPs of one layer, by what they are spent on."""

    attention: int
    ssd: int
    converter: int
    projections: int
    mlp: int

    @property
    def mixing(self) -> int:
        """What the TransPoint decides: attention, SSD and the Memory Converter."""
        return self.attention + self.ssd + self.converter

    @property
    def total(self) -> int:
        return self.mixing + self.projections + self.mlp


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleRow:
    """One layer of `TransPointSchedule.table`."""

    layer: int
    trans_point: int | None
    modes: tuple[Mode, ...]
    cache_bytes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleCost:
    """Costs of a schedule for one sequence; FLOPs are of a forward pass over `seq_len` tokens unless said otherwise."""

    schedule: TransPointSchedule
    shape: MixerShape
    seq_len: int

    @property
    def layers(self) -> tuple[LayerFlops, ...]:
        return tuple(layer_flops(self.shape, entry, 0, self.seq_len) for entry in self.schedule)

    @property
    def attention(self) -> int:
        return sum(layer.attention for layer in self.layers)

    @property
    def ssd(self) -> int:
        return sum(layer.ssd for layer in self.layers)

    @property
    def converter(self) -> int:
        return sum(layer.converter for layer in self.layers)

    @property
    def projections(self) -> int:
        return sum(layer.projections for layer in self.layers)

    @property
    def mlp(self) -> int:
        return sum(layer.mlp for layer in self.layers)

    @property
    def head(self) -> int:
        """The output projection to the vocabulary, at every position."""
        return self.seq_len * _head_flops(self.shape)

    @property
    def total(self) -> int:
        return sum(layer.total for layer in self.layers) + self.head

    def decode_flops(self, position: int) -> int:
        """FLOPs of reading the one token at `position` with a cache of those before it, and of its logits.

        At a TransPoint this includes turning the cached keys and values into the state.
        """
        _check_position(position)
        layers = (layer_flops(self.shape, entry, position, position + 1) for entry in self.schedule)
        return sum(layer.total for layer in layers) + _head_flops(self.shape)

    def cache_bytes(self, position: int) -> int:
        """Bytes that the cache holds once `position` tokens have been read and the next one is due at `position`."""
        return sum(self.layer_cache_bytes(position))

    def layer_cache_bytes(self, position: int) -> tuple[int, ...]:
        """`cache_bytes`, per layer."""
        _check_position(position)
        return tuple(_layer_cache_bytes(self.shape, entry, position) for entry in self.schedule)


def layer_flops(shape: MixerShape, trans_point: int | None, start: int, end: int) -> LayerFlops:
    """FLOPs of one layer that reads the tokens at positions [start, end), those before `start` being cached.

    attention    2 (n + p) per head for every pair of a token before the TransPoint and itself or an earlier token; P
                 tokens from the start make 2 P^2 d, up to 1 / P.
    ssd          within a chunk 2 (n + p) per head and pair, as in attention; 2 n p per token and state head to build
                 the state, and 2 n p per token and query head to read it: 4 d (Q / 2 + n) per token. A single token
                 takes the recurrent step, which has no pairs.
    converter    2 P n p per state head, once, when the first token at or after the TransPoint P > 0 is read.
    projections  queries, keys, values, output and the convolution for every token; step sizes for every token of a
                 layer that has a TransPoint; the gate for tokens that the SSM mixes.
    mlp          SwiGLU, three matrices of hidden_size x intermediate_size.
    """
    _check_position(start)
    if end < start:
        raise InputError(f"end={end} must not be below start={start}.")
    tokens = end - start
    middle = end if trans_point is None else min(max(start, trans_point), end)
    ssm_tokens = end - middle
    n, p, heads = shape.state_size, shape.head_dim, shape.num_attention_heads

    pairs = _causal_pairs(middle) - _causal_pairs(start)
    state_product = 2 * n * p
    if ssm_tokens == 1:
        chunk_pairs = 0
    else:
        chunks, rest = divmod(ssm_tokens, shape.chunk_size)
        chunk_pairs = chunks * _causal_pairs(shape.chunk_size) + _causal_pairs(rest)
    converts = trans_point is not None and 0 < trans_point < end and start <= trans_point

    per_token = 2 * shape.hidden_size * (shape.conv_channels + heads * p)
    if trans_point is not None:
        per_token += 2 * shape.hidden_size * shape.num_state_heads
    if _has_convolution(shape, trans_point):
        per_token += 2 * shape.conv_kernel * shape.conv_channels
    gate = 2 * shape.hidden_size * heads * p if shape.use_gate else 0

    return LayerFlops(
        attention=2 * (n + p) * heads * pairs,
        ssd=2 * (n + p) * heads * chunk_pairs + state_product * (shape.state_heads + heads) * ssm_tokens,
        converter=state_product * shape.state_heads * trans_point if converts and trans_point is not None else 0,
        projections=per_token * tokens + gate * ssm_tokens,
        mlp=6 * shape.hidden_size * shape.intermediate_size * tokens,
    )


def _layer_cache_bytes(shape: MixerShape, trans_point: int | None, position: int) -> int:
    tail = 0
    if _has_convolution(shape, trans_point):
        tail = (shape.conv_kernel - 1) * shape.conv_channels * shape.bytes_per_element
    if trans_point is not None and position >= trans_point:
        return tail + shape.state_heads * shape.state_size * shape.head_dim * shape.state_bytes_per_element
    per_token = 2 * shape.num_key_value_heads * shape.head_dim * shape.bytes_per_element
    if trans_point is not None:
        per_token += 4 * shape.num_state_heads  # fp32 step sizes, which the Memory Converter will need
    return tail + per_token * position


def _has_convolution(shape: MixerShape, trans_point: int | None) -> bool:
    return shape.conv_kernel > 0 and not (shape.mixer_form == "standard" and trans_point is None)


def _head_flops(shape: MixerShape) -> int:
    return 2 * shape.hidden_size * shape.vocab_size


def _causal_pairs(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def _attention_tokens(entry: int | None, seq_len: int) -> int:
    return seq_len if entry is None else min(entry, seq_len)


def _scaled_cycle(name: str, seq_len: int) -> tuple[int, ...]:
    published = PUBLISHED_CYCLES[name]
    scaled = _scale(published, seq_len)
    if len(set(scaled)) < len(published):
        enough = seq_len
        while len(set(_scale(published, enough))) < len(published):
            enough += 1
        raise ScheduleError(
            f"seq_len={seq_len} is too short for {name!r}: its {len(published)} TransPoints would fall together "
            f"({', '.join(map(str, scaled))}); use at least {enough} tokens or another schedule."
        )
    return scaled


def _scale(published: Sequence[int], seq_len: int) -> tuple[int, ...]:
    return tuple((2 * entry * seq_len + PUBLISHED_SEQ_LEN) // (2 * PUBLISHED_SEQ_LEN) for entry in published)


def _on_the_way(start: int | None, end: int | None, share: float, seq_len: int) -> int | None:
    if start == end:
        return start
    first, last = (seq_len if entry is None else min(entry, seq_len) for entry in (start, end))
    return round((first + 1) ** (1 - share) * (last + 1) ** share) - 1


def _check_entry(layer: int, entry: object) -> int | None:
    if entry is None:
        return None
    if isinstance(entry, bool) or not isinstance(entry, Integral):
        raise ScheduleError(
            f"Layer {layer} has TransPoint {entry!r} of type {type(entry).__name__}; it must be a whole number >= 0, "
            "or None for a layer that never switches."
        )
    if entry < 0:
        raise ScheduleError(
            f"Layer {layer} has TransPoint {int(entry)}; it must be >= 0. For a layer that is all SSM use 0, for one "
            "that never switches None."
        )
    return int(entry)


def _is_entry(word: str) -> bool:
    """Whether the word is an entry, well formed or not, rather than the name of a schedule."""
    return word in ("", "none", "...") or word[0] in "+-.0123456789"


def _parse_entry(layer: int, word: str) -> int | None:
    if word == "none":
        return None
    try:
        return int(word)
    except ValueError:
        raise ScheduleError(
            f'Layer {layer} has TransPoint {word!r}; write a whole number >= 0, or "none" for a layer that never '
            "switches."
        ) from None


def _check_position(position: int) -> None:
    if isinstance(position, bool) or not isinstance(position, Integral) or position < 0:
        raise InputError(f"position={position!r} must be a whole number >= 0.")


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise InputError(f"{name}={value!r} must be a whole number >= 1.")
