import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))  # the tiny task is shared with the tests of training

from tiny_task import make_data, make_model, recipe_for

from inlay.recipe import CompareRecipe, load_recipe


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
def recipe(tiny: Path, tmp_path: Path) -> Callable[..., CompareRecipe]:
    """Comparisons on the tiny task, in this process unless asked otherwise."""

    def make(**fields: Any) -> CompareRecipe:
        document = recipe_for(tiny, **{"output": str(tmp_path / "out"), "epochs": 1, "workers": 1, **fields})
        del document["method"]
        return load_recipe(document, CompareRecipe)

    return make
