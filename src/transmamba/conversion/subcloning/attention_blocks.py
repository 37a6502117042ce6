"""Map B: a student that keeps the Transformer's block and has a state space in the attention's place.

V becomes x, K becomes B, Q becomes C, O the output projection; norms, MLP, embeddings and head are copied. In a
TransMamba those are the same parameters in both modes, so this is the lossless conversion with fewer channels and
blocks. Whole heads are taken, since rotary embedding pairs the channels of a head: key heads first, then of each key
head's queries the best.
"""

from transmamba.conversion.source import HEAD
from transmamba.errors import InputError
from transmamba.models import TransMambaConfig

from .builder import TableBuilder
from .rankings import choose
from .teachers import RESIDUAL, language_axes


def add_attention_rows(table: TableBuilder, config: TransMambaConfig, blocks_of: tuple[int | None, ...]) -> None:
    """Add the rows of Map B. blocks_of: the depth map."""
    _check_fits(table, config)
    residual = table.residual(config.hidden_size)
    for name in table.teacher.tensors:
        if not name.startswith("model.layers."):
            indices = tuple(residual if axis == RESIDUAL else None for axis in language_axes(name))
            table.take(name, name, indices, is_linear=name == HEAD)
    for number, source in enumerate(blocks_of):
        if source is not None:
            _add_block(table, config, number, source, residual)


def _add_block(table: TableBuilder, config: TransMambaConfig, number: int, source: int, residual: str | None) -> None:
    ours, theirs = f"model.layers.{number}.", f"model.layers.{source}."
    keys, queries = _heads(table, config, source)
    sets = {
        RESIDUAL: residual,
        f"key {source}": table.given_set(f"block {number} keys", f"key {source}", keys),
        f"query {source}": table.given_set(f"block {number} queries", f"query {source}", queries),
        f"inner {source}": table.index_set(f"block {number} MLP", f"inner {source}", config.intermediate_size),
    }
    for name in table.teacher.tensors:
        if name.startswith(theirs):
            axes = language_axes(name)
            indices = tuple(None if axis is None else sets[axis] for axis in axes)
            table.take(ours + name.removeprefix(theirs), name, indices, is_linear=len(axes) == 2)


def _heads(table: TableBuilder, config: TransMambaConfig, source: int) -> tuple[list[int], list[int]]:
    """The channels of keys and values, and those of queries, that a block keeps: whole heads."""
    size = config.head_dim or 1
    theirs = table.sizes[f"key {source}"] // size
    group = table.sizes[f"query {source}"] // size // theirs
    wanted = config.num_key_value_heads or 1
    kept = config.num_attention_heads // wanted
    query_scores, key_scores = (table.scores.get(f"{kind} {source}") for kind in ("query", "key"))
    per_query = None if query_scores is None else query_scores.unflatten(0, (-1, size)).sum(1)
    per_key = None if key_scores is None else key_scores.unflatten(0, (-1, size)).sum(1)
    keys = choose(per_key, theirs, wanted)
    queries = [
        head for key in keys for head in choose(per_query, theirs * group, kept, range(key * group, (key + 1) * group))
    ]
    return [h * size + i for h in keys for i in range(size)], [h * size + i for h in queries for i in range(size)]


def _check_fits(table: TableBuilder, config: TransMambaConfig) -> None:
    """Raise InputError where the student's blocks are of another kind than the teacher's, or bigger."""
    sizes, tensors = table.sizes, table.teacher.tensors
    size = config.head_dim or 1
    embedding = tensors["model.embed_tokens.weight"].value
    heads, key_heads, head_dim = _teacher_heads(table)
    ours = config.num_key_value_heads or 1
    group, inner = config.num_attention_heads // ours, config.intermediate_size
    bounds = {
        "vocab_size": (config.vocab_size, embedding.shape[0], config.vocab_size == embedding.shape[0]),
        "head_dim": (size, head_dim, size == head_dim),
        "num_key_value_heads": (ours, key_heads, ours <= key_heads),
        "number of queries of a key head": (group, heads // key_heads, group <= heads // key_heads),
        "intermediate_size": (inner, sizes["inner 0"], 0 < inner <= sizes["inner 0"]),
    }
    for name, (found, bound, fits) in bounds.items():
        if not fits:
            relation = "the teacher's" if name in ("vocab_size", "head_dim") else "between 1 and the teacher's"
            raise InputError(f"the student's {name} is {found}; it must be {relation} {bound}.")
    if config.tie_word_embeddings == (HEAD in tensors):
        raise InputError(
            f"tie_word_embeddings={config.tie_word_embeddings} and the teacher's head is "
            f"{'its own' if HEAD in tensors else 'its embedding'}; set it to {HEAD not in tensors}."
        )
    positions = tensors.get("model.embed_positions.weight")
    if positions is not None and table.shapes.get("model.embed_positions.weight", (0,))[0] != positions.value.shape[0]:
        raise InputError(
            f"max_position_embeddings must be the teacher's {positions.value.shape[0]}, whose positions are taken."
        )
    for name in tensors:
        is_first = not name.startswith("model.layers.") or name.startswith("model.layers.0.")
        if is_first and name not in table.shapes:
            raise InputError(
                f"the student has no place for the teacher's {name}; give a configuration of the teacher's kind, "
                "such as convert(teacher)[0].config with other sizes."
            )


def _teacher_heads(table: TableBuilder) -> tuple[int, int, int]:
    """Query heads, key heads and head_dim of the teacher."""
    text = table.teacher.model.config.get_text_config()
    heads = text.num_attention_heads
    size = table.sizes["query 0"] // heads
    return heads, table.sizes["key 0"] // size, size
