from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_task import recipe_for

from inlay.recipe import Recipe, load_recipe


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Recipes on the tiny task whose output lies in the test's own folder."""

    def make(**fields: Any) -> Recipe:
        return load_recipe(recipe_for(tiny, **{"output": str(tmp_path / "out"), **fields}), Recipe)

    return make
