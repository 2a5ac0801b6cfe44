"""Fixtures of the report's tests; `open_report` serves any page that a test wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_browser import start, visit


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """One headless browser for all tests of a process."""
    driver = start(tmp_path_factory.mktemp("browser-profile"))
    yield driver
    driver.quit()


@pytest.fixture
def open_report(browser) -> Callable[..., Any]:
    """`open_report(path, width=1280, height=900, dark=False) -> webdriver` showing that file."""

    def opened(path: Path, **window: Any) -> Any:
        visit(browser, path, **window)
        return browser

    return opened
