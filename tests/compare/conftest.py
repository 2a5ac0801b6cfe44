from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_task import recipe_for

from inlay.recipe import CompareRecipe, load_recipe


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Callable[..., CompareRecipe]:
    """Comparisons on the tiny task, in this process unless asked otherwise."""

    def make(**fields: Any) -> CompareRecipe:
        document = recipe_for(tiny, **{"output": str(tmp_path / "out"), "epochs": 1, "workers": 1, **fields})
        del document["method"]
        return load_recipe(document, CompareRecipe)

    return make
