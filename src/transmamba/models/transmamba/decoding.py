"""Decode steps that are recorded once and replayed: what generation runs on a GPU, one graph per batch size and phase.

A phase says which layers attend, which are states and which are both, by row; it changes where a row crosses a
TransPoint. The host knows every row's position, so it chooses the graph, and hands prefixes over to states in between;
nothing waits for the device. `capture` is how a step is recorded: as a CUDA graph, or, to test the rest, not at all.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from transmamba.modules import (
    CausalConv1d,
    LayerMode,
    StaticCache,
    StepPlace,
    TransMambaCache,
    TransMambaMixer,
    hand_over,
    layer_mode,
    mixer_step,
    mlp_step,
    products,
)
from transmamba.ops.chain import chained

if TYPE_CHECKING:
    from .modeling import TransMambaDecoderLayer, TransMambaModel

logger = logging.getLogger(__name__)

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
LARGEST_BATCH = 256
SMALLEST_CAPACITY = 256
PLAIN = (nn.Linear, nn.RMSNorm, nn.LayerNorm, nn.Embedding, CausalConv1d)

Replay = Callable[[], object]


class Capture(Protocol):
    """How a step is recorded: given what to run, return what runs it again at the same addresses."""

    def __call__(self, run: Replay) -> Replay: ...


def run_eagerly(run: Replay) -> Replay:
    """Record nothing: the stand-in where there are no CUDA graphs."""
    return run


class CudaGraphs:
    """Record into CUDA graphs that share one pool of memory: replayed one at a time, they keep nothing there."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Replay) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            run()
        return graph.replay


class Phase(NamedTuple):
    """What the graphs of one batch size differ in.

    modes: of the layers with each TransPoint, in the order of the session's. places: bound of the stored keys that are
    read, a power of two.
    """

    modes: tuple[LayerMode, ...]
    places: int


class DecodeSession:
    """A static cache, the buffers of a step, and the recorded steps that read and write them."""

    def __init__(self, backbone: "TransMambaModel", head: nn.Linear, static: StaticCache, capture: Capture) -> None:
        self.backbone, self.head, self.static, self.capture = backbone, head, static, capture
        self.weights = addresses(backbone, head)
        self.steps: dict[Phase, Replay] = {}
        self.seen: set[Phase] = set()
        device = static.positions.device
        self.tokens = torch.zeros(static.rows, dtype=torch.int64, device=device)
        self.logits: Tensor | None = None
        self.mixers = [block.mixer for block in blocks_of(backbone)]
        self.points = list(dict.fromkeys(layer.trans_point for layer in static.layers))

    def phase(self) -> Phase:
        """The phase of the next step."""
        lengths, places = self.static.lengths, SMALLEST_CAPACITY
        ends = (min(lengths), max(lengths))
        modes = tuple(layer_mode(point, ends) for point in self.points)
        reading = [point for point, mode in zip(self.points, modes, strict=True) if mode is not LayerMode.SSM]
        if reading:
            longest = min(ends[1] + 1, max(self.static.capacity if point is None else point for point in reading))
            while places < longest:
                places *= 2
        return Phase(modes, places)

    def layer_modes(self, phase: Phase) -> list[LayerMode]:
        """The mode of every layer in a phase."""
        modes = dict(zip(self.points, phase.modes, strict=True))
        return [modes[layer.trans_point] for layer in self.static.layers]

    def hand_over(self) -> None:
        """Turn the stored prefixes of rows that cross a TransPoint with their next token into states."""
        tables: dict[int, tuple[Tensor, Tensor] | None] = {}
        if set(self.points).isdisjoint(self.static.lengths):
            return
        for mixer, layer in zip(self.mixers, self.static.layers, strict=True):
            point, rows = layer.trans_point, layer.crossing(self.static.lengths)
            if not rows or point is None:
                continue
            rotates = mixer.config.rotary and not mixer.config.ssm_rope
            if point not in tables:
                tables[point] = rotary_tables(self.backbone, torch.arange(point, device=self.tokens.device)[None])
            hand_over(mixer, layer, rows, tables[point] if rotates else None)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits of the next token of every row, (batch, vocab_size), after reading tokens (batch,)."""
        phase = self.phase()
        self.hand_over()
        self.tokens[: len(tokens)].copy_(tokens)
        self._run(phase)
        self.static.advance()
        assert self.logits is not None
        return self.logits[: len(tokens)].clone()

    def _run(self, phase: Phase) -> None:
        """The first time eagerly, for kernels to be compiled; the second time it is recorded; then it is replayed."""
        if phase not in self.steps and phase in self.seen:
            self.steps[phase] = self.capture(lambda: self._compute(phase))
        self.seen.add(phase)
        self.steps.get(phase, lambda: self._compute(phase))()

    def _compute(self, phase: Phase) -> None:
        """A chain wants of its caller that weights stay as they are, and that torch alone writes positions."""
        with chained() if self.static.rows == 1 else nullcontext():  # several rows are slower in one
            hidden = backbone_step(self.backbone, self.tokens, self.static, self.layer_modes(phase), phase.places)
            (logits,) = products(hidden, [self.head], self.backbone.norm)
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)
        self.static.positions.add_(1)

    @torch.inference_mode(False)
    @torch.no_grad()
    def warm_up(self, length: int) -> int:
        """Record the step of every phase that rows of one length pass from 1 to `length`; how many there are."""
        assert self.static.holder() is None
        phases = 0
        for position in self.borders(length):
            self.static.place([position])
            phase = self.phase()
            if phase not in self.steps:
                self._run(phase)
                self._run(phase)
                phases += 1
        self.static.place([0])
        return phases

    def borders(self, length: int) -> list[int]:
        """Positions below `length` of which one lies in every phase of rows of one length."""
        points = {layer.trans_point for layer in self.static.layers if layer.trans_point is not None}
        sizes = {SMALLEST_CAPACITY << i for i in range(length.bit_length())}
        return sorted(position for position in {1} | points | sizes if 0 < position < length)


def backbone_step(
    backbone: "TransMambaModel", tokens: Tensor, static: StaticCache, modes: Sequence[LayerMode], places: int
) -> Tensor:
    """The last layer's output for one token of every row, (rows, hidden_size), before the norm."""
    place = step_place(backbone, static, modes, places)
    hidden = backbone.embed_tokens(tokens)
    if backbone.embed_positions is not None:
        hidden = hidden + backbone.embed_positions(static.positions)
    for block, layer, mode in zip(blocks_of(backbone), static.layers, modes, strict=True):
        hidden = mixer_step(block.mixer, block.input_layernorm, hidden, place, layer, mode)
        if block.mlp is not None:
            hidden = mlp_step(block.mlp, block.post_attention_layernorm, hidden)
    return hidden


def blocks_of(backbone: "TransMambaModel") -> "list[TransMambaDecoderLayer]":
    return [cast("TransMambaDecoderLayer", block) for block in backbone.layers]


def step_place(backbone: "TransMambaModel", static: StaticCache, modes: Sequence[LayerMode], places: int) -> StepPlace:
    """Positions of a step, and the rotary tables there if a layer reads them."""
    rotates = backbone.config.ssm_rope or any(mode is not LayerMode.SSM for mode in modes)
    tables = rotary_tables(backbone, static.positions[:, None]) if rotates else None
    cos, sin = (None, None) if tables is None else tables
    return StepPlace(positions=static.positions, places=places, cos=cos, sin=sin)


def rotary_tables(backbone: "TransMambaModel", positions: Tensor) -> tuple[Tensor, Tensor] | None:
    """cos and sin in fp32 at positions (rows, tokens), (rows, tokens, head_dim); None where the model has none."""
    if backbone.rotary_emb is None:
        return None
    cos, sin = backbone.rotary_emb(torch.zeros(1, device=positions.device), positions)
    return cos, sin


class Decoder:
    """The sessions of one model; generation asks it for a step of whatever batch.

    capture: None records CUDA graphs, and does nothing on other devices. enabled: False keeps generation to the growing
    cache.
    """

    def __init__(self, capture: Capture | None = None, *, enabled: bool = True) -> None:
        self.capture, self.enabled = capture, enabled
        self.sessions: dict[tuple[int, int, int], DecodeSession] = {}  # by rows, capacity and shortest row
        self.kept: set[tuple[int, int, int]] = set()  # sessions that warm_up has made stay

    def session(
        self,
        backbone: "TransMambaModel",
        head: nn.Linear,
        mixers: Sequence[TransMambaMixer],
        batch: int,
        length: int,
        shortest: int = 0,
    ) -> DecodeSession:
        """The session for `batch` rows of `shortest` to `length` tokens; others are given up unless warmed up."""
        weights = addresses(backbone, head)
        points = [mixer.trans_point for mixer in mixers]
        switched = max([point + 1 for point in points if point is not None and point < shortest], default=0)
        key = (rounded_batch(batch), rounded_length(length), switched)
        stale = []
        for other, found in self.sessions.items():
            fits = found.weights == weights and [x.trans_point for x in found.static.layers] == points
            if fits and other[:2] == key[:2] and other[2] <= switched:
                return found
            if not fits or other not in self.kept:
                stale.append(other)
        for other in stale:
            holder = self.sessions.pop(other).static.holder()
            if holder is not None:
                holder.leave_static()
        parameter = next(backbone.parameters())
        static = StaticCache(
            [mixer.config for mixer in mixers],
            points,
            rows=key[0],
            capacity=key[1],
            dtype=parameter.dtype,
            device=parameter.device,
            shortest=switched,
        )
        if self.capture is None:
            self.capture = CudaGraphs()
        self.sessions[key] = DecodeSession(backbone, head, static, self.capture)
        return self.sessions[key]

    def keep(self, session: DecodeSession) -> None:
        """Do not give this session up when another batch size or length comes."""
        self.kept.add((session.static.rows, session.static.capacity, session.static.shortest))

    def step(
        self,
        backbone: "TransMambaModel",
        head: nn.Linear,
        mixers: Sequence[TransMambaMixer],
        cache: TransMambaCache,
        tokens: Tensor,
    ) -> Tensor:
        """One token of every row of a cache: logits (batch, vocab_size)."""
        assert cache.lengths is not None
        assert cache.planned_length is not None
        # What is written here again and again must be no tensor of inference mode, which only that mode may write.
        with torch.inference_mode(False), torch.no_grad():
            session = self._home(cache)
            if session is None:
                lengths, longest = cache.lengths, cache.planned_length
                session = self.session(backbone, head, mixers, len(lengths), longest, min(lengths))
                cache.enter_static(session.static)
            logits = session.step(tokens)
        cache.advance([1] * len(tokens), 1)
        return logits

    def _home(self, cache: TransMambaCache) -> DecodeSession | None:
        return next((x for x in self.sessions.values() if x.static.holder() is cache), None)

    def wanted_on(self, device: torch.device) -> bool:
        """Whether steps are to be recorded for a model on this device."""
        return self.enabled and (device.type == "cuda" or self.capture is not None)

    def __deepcopy__(self, memo: dict[int, object]) -> "Decoder":
        # Recorded steps are of one model's weights.
        return Decoder(None if isinstance(self.capture, CudaGraphs) else self.capture, enabled=self.enabled)

    def __reduce__(self) -> tuple[type["Decoder"], tuple[()]]:
        return Decoder, ()


def rounded_batch(batch: int) -> int:
    """The next batch size that has graphs: powers of two to 16, then multiples of 16."""
    if batch <= 16:
        return 1 << max(0, batch - 1).bit_length()
    return -(-batch // 16) * 16


def rounded_length(length: int) -> int:
    """The next capacity: four to an octave, so that sessions are used again and at most a fifth lies idle."""
    length = max(length, SMALLEST_CAPACITY)
    step = 1 << max(0, length.bit_length() - 3)
    return -(-length // step) * step


def addresses(*modules: nn.Module) -> tuple[int, ...]:
    """Where the weights lie: recorded steps read them there, and no longer fit when they move."""
    return tuple(parameter.data_ptr() for module in modules for parameter in module.parameters())


def obstacle(model: nn.Module, backbone: "TransMambaModel", *, batch: int, beams: int) -> str:
    """Why steps of this model cannot be recorded; empty if they can."""
    config = backbone.config
    if beams > 1:
        return "beam search moves rows after every token"
    if batch > LARGEST_BATCH:
        return f"the batch has {batch} rows, and graphs are made for up to {LARGEST_BATCH}"
    if model.training:
        return "the model is in training mode; call model.eval()"
    rotary = backbone.rotary_emb
    if rotary is not None and rotary.rope_type in LENGTH_DEPENDENT_ROPE:
        return f"rope_type {rotary.rope_type!r} changes its frequencies with the length"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "its weights lie on several devices"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has forward hooks, which a graph would leave out"
        if isinstance(module, PLAIN) and type(module) not in PLAIN:
            return f"{name} is a {type(module).__name__}; merge adapters into their weights (merge_and_unload)"
    for block in blocks_of(backbone):
        for part in (block.mixer, block.mlp):
            for name, child in () if part is None else part.named_children():
                if type(child) not in PLAIN and name != "act_fn":
                    return f"{name} is a {type(child).__name__}; merge adapters into their weights (merge_and_unload)"
    return "" if config.use_cache else "use_cache is off"


@lru_cache(maxsize=64)  # says each thing once
def announce(reason: str) -> None:
    logger.warning("decoding runs without CUDA graphs, which is slower: %s", reason)
