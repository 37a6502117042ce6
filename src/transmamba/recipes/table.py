"""The recipes that have a name, and those in files of your own."""

import difflib
import runpy
from collections.abc import Callable
from pathlib import Path

from transmamba.errors import RecipeError
from transmamba.recipes.language_model import LanguageModelRun
from transmamba.recipes.python_docs import (
    python_docs_hybrid_1_1,
    python_docs_hybrid_1_7,
    python_docs_mamba2,
    python_docs_transformer,
    python_docs_v9,
)
from transmamba.recipes.wiki import wiki_v9_36m_h200

__all__ = ["RECIPES", "find_recipe"]

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


def find_recipe(name: str) -> Callable[[], LanguageModelRun]:
    """The recipe of this name, or the function of `path/to/file.py:function`, whose file is run.

    Raises:
        RecipeError: there is no such recipe, file or function, or the function returns no run.
    """
    if name in RECIPES:
        return RECIPES[name]
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        return _from_file(Path(path), function)
    near = difflib.get_close_matches(name, RECIPES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise RecipeError(
        f"There is no recipe {name!r}.{hint} Known: {', '.join(RECIPES)}; or path/to/file.py:function, one of your own."
    )


def _from_file(path: Path, function: str) -> Callable[[], LanguageModelRun]:
    if not path.is_file():
        raise RecipeError(f"There is no file {path} to take the recipe {function!r} from.")
    recipe = runpy.run_path(str(path)).get(function)
    if not callable(recipe):
        raise RecipeError(f"{path} has no function {function!r}.")

    def checked() -> LanguageModelRun:
        run = recipe()
        if not isinstance(run, LanguageModelRun):
            raise RecipeError(
                f"{function!r} in {path} returns a {type(run).__name__}; a recipe returns a LanguageModelRun."
            )
        return run

    return checked
