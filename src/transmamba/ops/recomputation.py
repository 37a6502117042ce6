"""Tensors that forward does not keep for backward: what made them is called again there, on the same inputs.

Within `recomputing`, a result of `recomputed` is kept as a recipe wherever autograd would keep the tensor or a view of
it: the function and its inputs, which may be such results themselves. Backward calls the function once, for all who
kept its result and are still to come; each lets go of it when it has read it. The same function reads the same bits
and runs as it ran, so gradients are those of an ordinary backward pass, bit for bit, where it is deterministic.

What is worth it is the caller's to say: results that cost little beside what they hold, of inputs that are kept
anyway. Everything else in the block is kept as ever, also by hooks that were set around it (torch's own checkpointing
and offloading). torch.compile and torch.func choose by themselves; for them a block is as if it were not there.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias, TypeVar, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from transmamba.ops.precision import AUTOCAST_DEVICES, cast_once

R = TypeVar("R")
Hooks: TypeAlias = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]  # pack and unpack


class _Local(threading.local):
    block: "_Block | None" = None


_local = _Local()


def recomputing(enabled: bool = True) -> AbstractContextManager[None]:
    """Within, backward computes again what `recomputed` returned; where nothing is differentiated, an empty block."""
    if torch.compiler.is_compiling() or not enabled or not torch.is_grad_enabled():
        return nullcontext()
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:  # as torch.func does
        return nullcontext()
    return _open_block()


def recomputed(function: Callable[..., R], *inputs: Any, **keywords: Any) -> R:
    """Return function(*inputs, **keywords), one tensor or a tuple of some, and do not keep it for backward.

    The function must give the same whenever it is called on the same: no dropout, nothing written in place, no module
    with hooks. Tensors among the inputs (not inside of tuples) are kept, and must not be changed before backward.
    """
    outputs = function(*inputs, **keywords)
    block = None if torch.compiler.is_compiling() else _local.block
    if block is not None:
        block.register(outputs, function, inputs, keywords)
    return outputs


def is_recomputing() -> bool:
    """Whether this is within `recomputing`."""
    return not torch.compiler.is_compiling() and _local.block is not None


def is_recomputed(x: Tensor) -> bool:
    """Whether backward would compute x, or what it is a view of, again."""
    block = None if torch.compiler.is_compiling() else _local.block
    return block is not None and block.find(x) is not None


def recomputed_like(function: Callable[..., Tensor], x: Tensor, *inputs: Tensor) -> Tensor:
    """function(x, *inputs), computed again in backward where x is; elsewhere x would be kept in the result's place."""
    return recomputed(function, x, *inputs) if is_recomputed(x) else function(x, *inputs)


def cast_anew(x: Tensor) -> Tensor:
    """cast_once(x); the cast is not kept where x is a parameter or recomputed, and so costs nothing to keep."""
    spares = is_recomputing() and (isinstance(x, nn.Parameter) or is_recomputed(x))
    return recomputed(cast_once, x) if spares else cast_once(x)


def pick(x: Tensor, index: Tensor | tuple[slice, Tensor]) -> Tensor:
    """x[index]; the index is kept as it is."""
    return x[index]


def join(*parts: Tensor, dim: int) -> Tensor:
    """torch.cat, of parts that `recomputed` sees."""
    return torch.cat(parts, dim=dim)


@contextmanager
def _open_block() -> Iterator[None]:
    # Hooks do not nest in torch, the innermost sees everything; so this block hands on what it does not recompute.
    block, before = _Block(torch._C._autograd._top_saved_tensors_default_hooks(True)), _local.block
    _local.block = block
    try:
        with saved_tensors_hooks(block.pack, _unpack):
            yield
    finally:
        _local.block = before
        block.known.clear()


def _unpack(packed: "_Kept | _Handle") -> Tensor:
    return packed.unpack()


class _Kept:
    """A tensor that is kept, or what the hooks around the block made of it."""

    __slots__ = ("value", "version", "way_back")

    def __init__(self, x: Tensor, hooks: Hooks | None) -> None:
        self.way_back = None if hooks is None else hooks[1]
        self.value = x.detach() if hooks is None else hooks[0](x)  # with its grad_fn, an output would keep itself alive
        self.version = x._version

    def unpack(self) -> Tensor:
        if self.way_back is not None:
            return self.way_back(self.value)
        if self.value._version != self.version:  # autograd's own check ends where hooks begin
            raise RuntimeError(
                f"one of the variables needed for gradient computation has been modified by an inplace operation: it "
                f"has shape {tuple(self.value.shape)} and is at version {self.value._version}; expected version "
                f"{self.version}."
            )
        return cast(Tensor, self.value)


class _Handle:
    """What stands for a result, or a view of it, in one place that reads it in backward."""

    __slots__ = ("__weakref__", "index", "offset", "recipe", "result", "size", "stride")

    def __init__(self, recipe: "_Recipe", index: int, x: Tensor) -> None:
        self.recipe, self.index = recipe, index
        self.size, self.stride, self.offset = x.size(), x.stride(), x.storage_offset()
        self.result: Tensor | None = None
        recipe.handles.append(ref(self))

    def unpack(self) -> Tensor:
        if self.result is None:
            self.recipe.run()
        result, self.result = self.result, None
        assert result is not None
        return result.as_strided(self.size, self.stride, self.offset)


class _Recipe:
    """A call that can be made again."""

    __slots__ = ("autocast", "function", "handles", "inputs", "keywords", "layouts")

    def __init__(
        self, function: Callable[..., Any], inputs: list[Any], keywords: dict[str, Any], like: tuple[Tensor, ...]
    ) -> None:
        self.function, self.inputs, self.keywords = function, inputs, keywords
        self.layouts = [(x.size(), x.stride(), x.storage_offset()) for x in like]
        self.handles: list[ref[_Handle]] = []  # a WeakSet takes longer to make than a kernel to launch
        device = like[0].device.type
        self.autocast = None
        if device in AUTOCAST_DEVICES:
            self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def run(self) -> None:
        """Call it again, and give the result to every place that may still read it."""
        inputs = [_given(x) for x in self.inputs]
        keywords = {name: _given(x) for name, x in self.keywords.items()}
        before, _local.block = _local.block, None
        try:
            with torch.no_grad(), self._forward_precision():
                results = _tensors(self.function(*inputs, **keywords))
        finally:
            _local.block = before
        assert [(x.size(), x.stride(), x.storage_offset()) for x in results] == self.layouts
        for reference in self.handles:
            handle = reference()
            if handle is not None:
                handle.result = results[handle.index]

    def _forward_precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        device, dtype, enabled = self.autocast
        return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)


class _Result:
    """A result as forward has it. It is held as long as its block, so that no other tensor gets its memory."""

    __slots__ = ("index", "recipe", "value", "version")

    def __init__(self, recipe: _Recipe, index: int, x: Tensor) -> None:
        self.recipe, self.index, self.value, self.version = recipe, index, x.detach(), x._version


class _Block:
    """The results that are known within one `recomputing`, by their memory."""

    def __init__(self, hooks: Hooks | None) -> None:
        self.hooks = hooks
        self.known: dict[int, _Result] = {}

    def pack(self, x: Tensor) -> "_Kept | _Handle":
        found = self.find(x)
        return _Kept(x, self.hooks) if found is None else _Handle(found.recipe, found.index, x)

    def find(self, x: Tensor) -> _Result | None:
        if type(x) is not Tensor or x.layout != torch.strided:
            return None
        found = self.known.get(x.untyped_storage()._cdata)
        if found is None or found.value.dtype != x.dtype or found.value._version != found.version:
            return None  # nothing of ours, or written to since
        return found

    def register(
        self, outputs: Any, function: Callable[..., Any], inputs: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        results = _tensors(outputs)
        if not results or any(type(x) is not Tensor for x in results):
            return
        places = [x.untyped_storage()._cdata for x in results]
        given = (x for x in (*inputs, *keywords.values()) if isinstance(x, Tensor))
        # A view of an input, or of another result, has no memory of its own to spare.
        taken = {x.untyped_storage()._cdata for x in given if type(x) in (Tensor, nn.Parameter)} | set(self.known)
        if len(set(places)) < len(places) or not taken.isdisjoint(places):
            return
        kept = [self._keep(x) for x in inputs]
        recipe = _Recipe(function, kept, {name: self._keep(x) for name, x in keywords.items()}, results)
        for index, (place, x) in enumerate(zip(places, results, strict=True)):
            self.known[place] = _Result(recipe, index, x)

    def _keep(self, x: Any) -> Any:
        return self.pack(x) if isinstance(x, Tensor) else x


def _tensors(outputs: Any) -> tuple[Tensor, ...]:
    if isinstance(outputs, Tensor):
        return (outputs,)
    return tuple(x for x in outputs if isinstance(x, Tensor)) if isinstance(outputs, tuple) else ()


def _given(x: Any) -> Any:
    return x.unpack() if isinstance(x, _Kept | _Handle) else x
