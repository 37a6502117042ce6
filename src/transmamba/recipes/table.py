"""The recipes that have a name, and those in files of your own."""

import difflib
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from transmamba.errors import RecipeError
from transmamba.recipes.adaptation import (
    AdaptationRun,
    adapt,
    adapt_v1,
    adapt_v2,
    bridging,
    distil_only,
    from_scratch,
    mixing,
    public_release,
    soft_logits,
    weight_reuse,
)
from transmamba.recipes.distillation import DistillationRun, descend, mohawk, plain_kl
from transmamba.recipes.language_model import LanguageModelRun
from transmamba.recipes.python_docs import (
    python_docs_hybrid_1_1,
    python_docs_hybrid_1_7,
    python_docs_mamba2,
    python_docs_transformer,
    python_docs_v9,
)
from transmamba.recipes.sentence_adaptation import (
    SentenceAdaptationRun,
    adapt_sentences,
    embedding_only,
    from_scratch_sentences,
    new_student,
    weight_reuse_sentences,
)
from transmamba.recipes.wiki import wiki_v9_36m_h200

__all__ = [
    "ADAPTATIONS",
    "DISTILLATIONS",
    "RECIPES",
    "SENTENCE_ADAPTATIONS",
    "find_adaptation",
    "find_distillation",
    "find_recipe",
    "find_sentence_adaptation",
]

Run = TypeVar("Run")

RECIPES: dict[str, Callable[[], LanguageModelRun]] = {
    recipe.__name__: recipe
    for recipe in (
        python_docs_v9,
        python_docs_transformer,
        python_docs_mamba2,
        python_docs_hybrid_1_1,
        python_docs_hybrid_1_7,
        wiki_v9_36m_h200,
    )
}

DISTILLATIONS: dict[str, Callable[[], DistillationRun]] = {
    recipe.__name__: recipe for recipe in (descend, mohawk, plain_kl)
}

ADAPTATIONS: dict[str, Callable[[], AdaptationRun]] = {
    recipe.__name__: recipe
    for recipe in (
        adapt,
        adapt_v1,
        adapt_v2,
        distil_only,
        weight_reuse,
        from_scratch,
        soft_logits,
        public_release,
        bridging,
        mixing,
    )
}

SENTENCE_ADAPTATIONS: dict[str, Callable[[], SentenceAdaptationRun]] = {
    recipe.__name__: recipe
    for recipe in (adapt_sentences, new_student, embedding_only, weight_reuse_sentences, from_scratch_sentences)
}


def find_recipe(name: str) -> Callable[[], LanguageModelRun]:
    """The recipe of this name for `transmamba train`, or the function of `path/to/file.py:function`, whose file is run.

    Raises:
        RecipeError: there is no such recipe, file or function, or the function returns no run of this kind.
    """
    return _find(name, RECIPES, LanguageModelRun)


def find_distillation(name: str) -> Callable[[], DistillationRun]:
    """The recipe of this name for `transmamba distill`, or the function of a file; see find_recipe."""
    return _find(name, DISTILLATIONS, DistillationRun)


def find_adaptation(name: str) -> Callable[[], AdaptationRun]:
    """The recipe of this name for `transmamba adapt`, or the function of a file; see find_recipe."""
    return _find(name, ADAPTATIONS, AdaptationRun)


def find_sentence_adaptation(name: str) -> Callable[[], SentenceAdaptationRun]:
    """The recipe of this name for `transmamba adapt --task sentence-embedding`, or the function of a file."""
    return _find(name, SENTENCE_ADAPTATIONS, SentenceAdaptationRun)


def _find(name: str, known: dict[str, Callable[[], Run]], kind: type[Run]) -> Callable[[], Run]:
    if name in known:
        return known[name]
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        return _from_file(Path(path), function, kind)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise RecipeError(
        f"There is no recipe {name!r}.{hint} Known: {', '.join(known)}; or path/to/file.py:function, one of your own."
    )


def _from_file(path: Path, function: str, kind: type[Run]) -> Callable[[], Run]:
    if not path.is_file():
        raise RecipeError(f"There is no file {path} to take the recipe {function!r} from.")
    recipe = runpy.run_path(str(path)).get(function)
    if not callable(recipe):
        raise RecipeError(f"{path} has no function {function!r}.")

    def checked() -> Run:
        run = recipe()
        if not isinstance(run, kind):
            raise RecipeError(
                f"{function!r} in {path} returns a {type(run).__name__}; a recipe returns a {kind.__name__} here."
            )
        return run

    return checked
