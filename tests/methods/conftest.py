from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def _in_all_modules(own_cache):
    """Nothing here touches the user's cache."""
