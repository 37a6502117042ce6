"""The state space, the hybrid layer and attention side by side, each behind a check at the shape that is timed.

A check runs the timed call on the timed tensors. Its gradient of the output is zero but for some rows and positions, so
that fp64 needs to compute only those, and still sees every gradient. Attention's are the last queries of its part.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention, softplus

from transmamba.errors import InputError
from transmamba.ops import hybrid_mixer, memory_converter, ssd_scan
from transmamba.ops.backends import resolve_backend
from transmamba.progress import progress_bar

from .timing import Rates, Timing, compute_dtype, measure_rates, provenance, time_call

Inputs = dict[str, Tensor]
Function = Callable[..., Tensor]

CHECKED_TOKENS = 8192  # of whole rows, one at the least
CHECKED_QUERIES = 64  # of attention: all of them would need (tokens, tokens) in fp64
# bf16 rounds each term a few times, by 2^-9 on average, and tf32 as often by 2^-12; wrong formulas are off by tenths.
BOUNDS = {torch.bfloat16: 3 * 2**-8, torch.float32: 1e-4}
ATTENTION = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True, kw_only=True, slots=True)
class OpShape:
    """Rows, tokens of each, heads of queries and of keys and values, and their size, which is the state's too."""

    batch: int
    seq_len: int
    heads: int
    kv_heads: int
    size: int

    @property
    def name(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"{self.batch}x{self.seq_len} tokens, {heads} heads of {self.size}"

    @staticmethod
    def parse(text: str) -> "OpShape":
        """Read batch x tokens x heads x size, such as 32x2048x16x128; 8/4 heads share keys and values in twos."""
        try:
            batch, seq_len, heads, size = text.split("x")
            q_heads, _, kv_heads = heads.partition("/")
            counts = [int(x) for x in (batch, seq_len, q_heads, kv_heads or q_heads, size)]
        except ValueError:
            raise InputError(f"shape {text!r}: give batch x tokens x heads x size, such as 32x2048x16x128.") from None
        if min(counts) < 1 or counts[2] % counts[3]:
            raise InputError(f"shape {text!r}: give numbers from 1 on, and key-value heads that divide the heads.")
        return OpShape(**dict(zip(("batch", "seq_len", "heads", "kv_heads", "size"), counts, strict=True)))


@dataclass(frozen=True, kw_only=True, slots=True)
class OpsOptions:
    """shapes, hybrid: as OpShape.parse reads them, commas between; what is empty is left out.

    points: of the hybrid layer's cycle. seconds: of each measurement. plain: time our plain PyTorch form too.
    """

    shapes: str
    hybrid: str
    points: str
    seconds: float = 0.3
    plain: bool = False

    @staticmethod
    def for_device(device: torch.device) -> "OpsOptions":
        """The shapes of the targets on a CUDA device, small ones elsewhere."""
        if device.type == "cuda":
            rows = "32x2048x16x128,8x8192x16x128,2x32768x16x128,32x2048x32x64,2x32768x32x64,1x131072x16x128"
            return OpsOptions(
                shapes=f"{rows},32x2048x8/4x64", hybrid="8x8192x16x128", points="0,128,256,512,1024,2048,4096,8192"
            )
        return OpsOptions(shapes="2x512x4x32,1x2048x4/2x64", hybrid="1x512x4x32", points="0,128,512", plain=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class OpRow:
    """One measurement; `kind` says what it is of, `what` by whom. Floors in milliseconds."""

    shape: str
    kind: str
    what: str
    passes: str  # "forward", or "both": with backward
    error: float
    memory_floor: float
    matrix_floor: float
    timing: Timing


@dataclass(kw_only=True)
class OpsResult:
    """rows, and for the hybrid layer the mean over its cycle. failures: what was wrong and therefore not timed."""

    provenance: dict[str, Any]
    options: OpsOptions
    rates: Rates
    rows: list[OpRow] = field(default_factory=list)
    hybrid: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_ops(
    device: torch.device,
    options: OpsOptions | None = None,
    *,
    command: str = "",
    show: Callable[[str], None] = lambda line: None,
) -> OpsResult:
    """Check and time everything that can run here; `show` is given each line as soon as it is measured.

    Raises:
        InputError: a shape or a TransPoint that cannot be read.
    """
    options = OpsOptions.for_device(device) if options is None else options
    shapes = [OpShape.parse(text) for text in options.shapes.split(",") if text]
    hybrid = OpShape.parse(options.hybrid) if options.hybrid else None
    points = _points(options.points, hybrid)
    torch.manual_seed(0)
    with torch.inference_mode(False):
        result = OpsResult(
            provenance=provenance(device, command),
            options=options,
            rates=measure_rates(device, seconds=options.seconds),
        )
        bench = _Bench(device, options, result, show)
        show(
            f"{result.provenance['device']}: copies at {result.rates.copy_bytes * 1e-12:.3g} TB/s, products at "
            f"{result.rates.matrix_operations * 1e-12:.3g} TFLOP/s"
        )
        with progress_bar("Timing", len(shapes) + len(points)) as advance:
            for shape in shapes:
                bench.measure_shape(shape)
                advance(1)
            if hybrid is not None:
                bench.measure_hybrid(hybrid, points, advance)
    return result


class _Bench:
    def __init__(
        self, device: torch.device, options: OpsOptions, result: OpsResult, show: Callable[[str], None]
    ) -> None:
        self.device, self.options, self.result, self.show = device, options, result, show
        self.bound = BOUNDS[compute_dtype(device)]

    def measure_shape(self, shape: OpShape) -> None:
        """Our scan and converter, attention, and the peers' scans."""
        self.show(shape.name)
        inputs = inputs_of(shape, self.device)
        for what, call in self._scans(shape, inputs):
            self._measure(shape, "ssd_scan", what, call, inputs, 0)
        for what, call in peers_without_skip(shape, self.device):
            given = {name: x for name, x in inputs.items() if name != "D"}
            self._measure(shape, "ssd_scan", what, call, given, 0)
        self._measure_converter(shape, inputs, shape.seq_len)
        attended = {name: inputs[name] for name in ("q", "k", "v")}
        for what, call in self._attentions(shape):
            self._measure(shape, "attention", what, call, attended, shape.seq_len)
        del inputs, attended
        self._release()

    def measure_hybrid(self, shape: OpShape, points: list[int], advance: Callable[[int], None]) -> None:
        """The layer at every TransPoint of the cycle, beside the sum of its parts and attention throughout."""
        self.show(f"hybrid layer, {shape.name}")
        inputs = inputs_of(shape, self.device)
        part_names = ("attention on the prefix", "ssd_scan on the suffix", "Memory Converter")
        times: dict[str, list[float]] = {name: [] for name in ("hybrid", *part_names)}
        best = self._best_attention(shape, inputs)
        whole = None if best is None else self._whole_attention(shape, inputs, *best)
        for point in points:
            row = self._measure(shape, "hybrid", f"TransPoint {point}", partial(_mix, point), inputs, point)
            times["hybrid"].append(row.timing.median if row else float("nan"))
            parts = self._parts(shape, inputs, point, best)
            for name, value in zip(part_names, parts, strict=True):
                times[name].append(value)
            advance(1)
        means = {name: sum(values) / len(values) for name, values in times.items()}
        in_parts = means[part_names[0]] + means[part_names[1]]
        self.result.hybrid = {
            "shape": asdict(shape),
            "points": points,
            "milliseconds": times,
            "mean": means,
            "attention_throughout": whole,
            "over_its_parts": means["hybrid"] / in_parts,
            "attention_throughout_over_hybrid": None if whole is None else whole / means["hybrid"],
            "converter_share": means["Memory Converter"] / means["hybrid"],
            "attention": best[0] if best else None,
        }

    def _scans(self, shape: OpShape, inputs: Inputs) -> Iterator[tuple[str, Function]]:
        name = resolve_backend("ssd_scan", None, inputs["k"], inputs["v"])
        yield f"transmamba ({name})", partial(_scan, name)
        if self.options.plain and name != "torch":
            yield "transmamba (torch)", partial(_scan, "torch")
        yield from peers(shape, self.device)

    def _attentions(self, shape: OpShape) -> Iterator[tuple[str, Function]]:
        grouped = shape.heads != shape.kv_heads
        if self.device.type != "cuda":
            yield "SDPA", partial(_attend, None, grouped)
            return
        for name, backend in ATTENTION.items():
            yield f"SDPA {name}", partial(_attend, backend, grouped)

    def _best_attention(self, shape: OpShape, inputs: Inputs) -> tuple[str, Function] | None:
        """The first that runs: cuDNN's on a GPU."""
        for what, call in self._attentions(shape):
            try:
                call(*(inputs[name][:1, :128] for name in ("q", "k", "v")))
            except RuntimeError:
                continue
            return what, call
        return None

    def _whole_attention(self, shape: OpShape, inputs: Inputs, what: str, call: Function) -> float | None:
        attended = {name: inputs[name] for name in ("q", "k", "v")}
        name = f"{what} throughout"
        row = self._measure(shape, "hybrid", name, call, attended, shape.seq_len, passes=("both",))
        return None if row is None else row.timing.median

    def _parts(
        self, shape: OpShape, inputs: Inputs, point: int, best: tuple[str, Function] | None
    ) -> tuple[float, float, float]:
        """Milliseconds with backward of attention, of the scan, and of the converter, each by itself."""
        time = partial(time_call, device=self.device, seconds=self.options.seconds)
        prefix = {name: x[:, :point] if x.dim() > 2 else x for name, x in inputs.items()}
        suffix = {name: x[:, point:] if x.dim() > 2 else x for name, x in inputs.items()}
        attention = scan = converter = 0.0
        if point and best is not None:
            # Dense, which attention is fastest on. Views of a joint projection once ended in an illegal memory access.
            attended = {name: prefix[name].contiguous() for name in ("q", "k", "v")}
            attention = time(_both(best[1], attended, _gradient_of(prefix))).median
        if point < shape.seq_len:
            scan = time(_both(partial(_scan, None), suffix, _gradient_of(suffix))).median
            if point:
                kept = {name: prefix[name] for name in ("k", "v", "dt", "A")}
                state = _convert(*kept.values())
                converter = time(_both(_convert, kept, torch.randn_like(state))).median
        return attention, scan, converter

    def _measure_converter(self, shape: OpShape, inputs: Inputs, prefix: int) -> None:
        kept = {name: inputs[name] for name in ("k", "v", "dt", "A")}
        rows = _checked_rows(inputs["k"])
        double = {name: (x[:rows] if x.dim() > 1 else x).double() for name, x in kept.items()}
        exact = memory_converter(*double.values(), backend="torch", validate=False)
        error = _relative(_convert(*kept.values())[:rows], exact)
        if not self._agrees(shape, "memory_converter", {"state": error}):
            return
        run = partial(_without_gradients, _convert, *kept.values())
        moved = sum(x.numel() * x.element_size() for x in (kept["k"], kept["v"]))
        operations = 2.0 * shape.batch * prefix * max(shape.kv_heads, kept["dt"].shape[2]) * shape.size**2
        self._time(shape, "memory_converter", "transmamba", "forward", run, error, moved, operations)

    def _measure(
        self,
        shape: OpShape,
        kind: str,
        what: str,
        call: Function,
        inputs: Inputs,
        point: int,
        passes: tuple[str, ...] = ("forward", "both"),
    ) -> OpRow | None:
        """Check, then time; the last row, or None where nothing was timed."""
        try:
            exact = Exact(inputs, point=point)
        except torch.OutOfMemoryError:
            self._leave_out(f"{shape.name}, {kind} {what}: fp64 does not fit into memory, so it cannot be checked")
            return None
        try:
            errors = exact.errors_of(call, inputs)
        except RuntimeError as error:  # no kernel for this shape, or no memory
            line = f"{shape.name}, {kind} {what}: {_first_line(error)}"
            if kind == "hybrid" or what.startswith("transmamba"):
                self._fail(line)
            else:
                self._leave_out(line)
            return None
        row = None
        del exact
        self._release()
        if self._agrees(shape, f"{kind} {what}", errors):
            moved, operations = floors_of(shape, point, compute_dtype(self.device))
            dy = _gradient_of(inputs)
            runs: dict[str, Callable[[], Any]] = {
                "forward": partial(_without_gradients, call, *inputs.values()),
                "both": _both(call, inputs, dy),
            }
            for index, name in enumerate(("forward", "both")):
                if name in passes:
                    row = self._time(
                        shape, kind, what, name, runs[name], max(errors.values()), moved[index], operations[index]
                    )
        self._release()
        return row

    def _time(
        self,
        shape: OpShape,
        kind: str,
        what: str,
        passes: str,
        run: Callable[[], Any],
        error: float,
        moved: float,
        operations: float,
    ) -> OpRow:
        memory, matrix = self.result.rates.floor_ms(moved, operations)
        row = OpRow(
            shape=shape.name,
            kind=kind,
            what=what,
            passes=passes,
            error=float(f"{error:.2g}"),
            memory_floor=round(memory, 4),
            matrix_floor=round(matrix, 4),
            timing=time_call(run, self.device, seconds=self.options.seconds),
        )
        self.result.rows.append(row)
        timing = row.timing
        self.show(
            f"  {kind:16s} {what:22s} {passes:8s}{timing.median:10.3f} ms  [{timing.quartiles[0]:.3f}, "
            f"{timing.quartiles[1]:.3f}]  host {timing.host:.3f}  floors {memory:.3f} {matrix:.3f}  error {error:.1e}"
        )
        return row

    def _agrees(self, shape: OpShape, what: str, errors: Mapping[str, float]) -> bool:
        worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
        if errors[worst] < self.bound:
            return True
        failure = (
            f"{shape.name}, {what}: {worst} differs from fp64 by {errors[worst]:.2g}, and {self.bound:.2g} is allowed; "
            "not timed."
        )
        self._fail(failure)
        return False

    def _fail(self, line: str) -> None:
        self.result.failures.append(line)
        self.show(f"  WRONG {line}")

    def _leave_out(self, line: str) -> None:
        self.result.left_out.append(line)
        self.show(f"  left out: {line}")

    def _release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Exact:
    """What a hybrid layer of this TransPoint, on these inputs, computes in fp64: rows, gradients, and the errors of
    others. The state space from `point` on, and attention's last queries before it.
    """

    def __init__(self, inputs: Inputs, *, point: int) -> None:
        self.point = point
        q = inputs["q"]
        self.rows = _checked_rows(q)
        self.first = max(0, point - CHECKED_QUERIES)
        self.weight = torch.zeros(*q.shape[:3], inputs["v"].shape[3], dtype=q.dtype, device=q.device)
        self.weight[: self.rows, self.first :].normal_()
        leaves = {
            name: (x[: self.rows] if x.dim() > 1 else x).detach().double().requires_grad_()
            for name, x in inputs.items()
        }
        y = self._outputs(leaves)
        gradients = torch.autograd.grad(
            y, list(leaves.values()), self.weight[: self.rows, self.first :].double(), allow_unused=True
        )
        self.y = y.detach()
        self.gradients = {
            name: torch.zeros_like(x) if gradient is None else gradient
            for (name, x), gradient in zip(leaves.items(), gradients, strict=True)
        }
        self.dt, self.A = (leaves[name].detach() if name in leaves else None for name in ("dt", "A"))

    def errors_of(self, call: Function, inputs: Inputs) -> dict[str, float]:
        """Relative errors of the call's outputs and gradients; of A's, over its terms' sum without signs."""
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        y = call(*leaves.values())
        found = torch.autograd.grad(y, list(leaves.values()), self.weight, allow_unused=True)
        errors = {"y": _relative(y.detach()[: self.rows, self.first :], self.y)}
        for (name, exact), gradient in zip(self.gradients.items(), found, strict=True):
            if gradient is None:
                errors[f"gradient of {name}"] = float(exact.abs().max() > 0)
            elif name == "A" and self.dt is not None and self.A is not None:
                terms = (self.dt * self.gradients["dt"]).abs().sum((0, 1)) / self.A.abs()
                off = ((gradient.double() - exact).abs() / terms.clamp_min(1e-300)).max()
                errors["gradient of A"] = 0.0 if not exact.abs().max() > 0 else off.item()
            else:
                part = gradient if exact.dim() == 1 else gradient[: self.rows]
                errors[f"gradient of {name}"] = _relative(part, exact)
        return errors

    def _outputs(self, leaves: Inputs) -> Tensor:
        q, k, v = (leaves[name] for name in ("q", "k", "v"))
        parts = []
        if self.point:
            parts.append(_last_queries(q[:, : self.point], k[:, : self.point], v[:, : self.point], self.first))
        if self.point < q.shape[1]:
            scanned = ssd_scan(q, k, v, leaves["dt"], leaves["A"], leaves.get("D"), backend="torch", validate=False)
            parts.append(scanned[:, self.point :])
        return torch.cat(parts, dim=1)


def inputs_of(shape: OpShape, device: torch.device) -> Inputs:
    """q, k, v as views of one projection; heads that remember from a few tokens to thousands."""
    dtype = compute_dtype(device)
    widths = [count * shape.size for count in (shape.heads, shape.kv_heads, shape.kv_heads)]
    qkv = torch.empty(shape.batch, shape.seq_len, sum(widths), device=device, dtype=dtype).normal_()
    qkv.mul_(shape.size**-0.25)
    q, k, v = (x.unflatten(-1, (-1, shape.size)) for x in qkv.split(widths, dim=-1))
    dt = softplus(torch.randn(shape.batch, shape.seq_len, shape.heads, device=device) - 3)
    A = -torch.logspace(-2, 1, shape.heads, device=device)
    return {"q": q, "k": k, "v": v, "dt": dt, "A": A, "D": torch.randn(shape.heads, device=device)}


def floors_of(shape: OpShape, point: int, dtype: torch.dtype) -> tuple[tuple[float, float], tuple[float, float]]:
    """Bytes and operations, (forward, with backward) each: every input and output moved once; needed products only.

    The state space: chunks of 64 tokens. Attention: causal pairs, and five products backward.
    """
    tokens = shape.batch * shape.seq_len
    wide, narrow = (dtype.itemsize * tokens * heads * shape.size for heads in (shape.heads, shape.kv_heads))
    moved = (2.0 * wide + 2 * narrow, 5.0 * wide + 6 * narrow)
    scanned = shape.batch * (shape.seq_len - point) * shape.heads
    pair_products, state_products = 2 * 64 * shape.size, 2 * shape.size**2
    per_pair = 4 * shape.size * shape.batch * shape.heads * point * (point + 1) / 2
    scan = (
        scanned * (2.0 * pair_products + 2 * state_products),
        scanned * (7.0 * pair_products + 7 * state_products),
    )
    converted = 2.0 * shape.batch * point * shape.heads * shape.size**2 if 0 < point < shape.seq_len else 0.0
    return moved, (scan[0] + per_pair + converted, scan[1] + 3.5 * per_pair + 3 * converted)


def peers(shape: OpShape, device: torch.device) -> Iterator[tuple[str, Function]]:
    """The same scan by other libraries, where they are installed; they have as many heads everywhere."""
    if shape.heads != shape.kv_heads or device.type != "cuda":
        return
    if find_spec("mamba_ssm"):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        def mamba(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor) -> Tensor:
            y: Tensor = mamba_chunk_scan_combined(v, dt, A, k, q, chunk_size=128, D=D)
            return y

        yield "mamba_ssm", mamba


def peers_without_skip(shape: OpShape, device: torch.device) -> Iterator[tuple[str, Function]]:
    """Those whose scan knows no D."""
    if shape.heads != shape.kv_heads or device.type != "cuda" or not find_spec("fla"):
        return
    from fla.ops.simple_gla import chunk_simple_gla

    def gla(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor) -> Tensor:
        y: Tensor = chunk_simple_gla(q, k, v * dt[..., None].to(v.dtype), dt * A, scale=1.0)[0]
        return y

    yield "fla simple_gla", gla


def _points(text: str, shape: OpShape | None) -> list[int]:
    if shape is None:
        return []
    try:
        points = [int(word) for word in text.split(",") if word]
    except ValueError:
        raise InputError(f"points {text!r}: give whole numbers with commas between.") from None
    if not points or not all(0 <= point <= shape.seq_len for point in points):
        raise InputError(f"points {text!r}: give numbers from 0 to the {shape.seq_len} tokens of the hybrid layer.")
    return points


def _scan(backend: str | None, q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor) -> Tensor:
    return ssd_scan(q, k, v, dt, A, D, backend=backend, validate=False)


def _mix(point: int, q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, D: Tensor) -> Tensor:
    return hybrid_mixer(q, k, v, dt, A, D, trans_point=point, validate=False)


def _convert(k: Tensor, v: Tensor, dt: Tensor, A: Tensor) -> Tensor:
    return memory_converter(k, v, dt, A, validate=False)


def _attend(backend: SDPBackend | None, grouped: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend is None:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def _last_queries(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
    """Softmax attention of the queries from `first` on, in the inputs' precision."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, dim=2).transpose(1, 2) for x in (k, v))
    scores = q[:, first:].transpose(1, 2) @ k.transpose(-1, -2) * q.shape[3] ** -0.5
    position = torch.arange(k.shape[2], device=k.device)
    scores = scores.masked_fill(position > position[first:, None], float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def _both(call: Function, inputs: Inputs, gradient: Tensor) -> Callable[[], Any]:
    leaves = [x.detach().requires_grad_() for x in inputs.values()]

    def run() -> None:
        torch.autograd.grad(call(*leaves), leaves, gradient, allow_unused=True)

    return run


def _gradient_of(inputs: Inputs) -> Tensor:
    q, v = inputs["q"], inputs["v"]
    return torch.empty(*q.shape[:3], v.shape[3], dtype=v.dtype, device=v.device).normal_()


def _without_gradients(call: Function, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return call(*inputs)


def _checked_rows(x: Tensor) -> int:
    return min(x.shape[0], max(1, CHECKED_TOKENS // x.shape[1]))


def _relative(actual: Tensor, exact: Tensor) -> float:
    scale = exact.norm().item()
    return (actual.detach().double() - exact).norm().item() / (scale or 1.0)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
