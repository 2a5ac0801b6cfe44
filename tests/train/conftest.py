import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_task import make_data, make_model, recipe_for

from inlay.recipe import Recipe, load_recipe


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model and its data, made once."""
    folder = tmp_path_factory.mktemp("tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_model(folder / "model")
    make_data(folder / "data")
    return folder


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Recipes on the tiny task whose output lies in the test's own folder."""

    def make(**fields: Any) -> Recipe:
        return load_recipe(recipe_for(tiny, **{"output": str(tmp_path / "out"), **fields}), Recipe)

    return make
