"""Reading models whose modules are smaller than their architecture has them: folded attention, thin products.

What was replaced stands in the configuration that was saved with the weights.
"""

from __future__ import annotations

from typing import Any

import torch

from loras_bench.methods import REPLACING


def from_pretrained(automatic: Any, path: str, config: Any, **options: Any) -> tuple[Any, Any]:
    """A model and its loading information as transformers' `from_pretrained` gives them.

    Args:
        automatic: transformers' automatic class of the task.
        path: Folder, or hub id.
        config: Of the model.
        **options: Of `from_pretrained`.
    """
    methods = [made for method in REPLACING if (made := method.of(config)) is not None]
    if not methods:
        return automatic.from_pretrained(path, config=config, output_loading_info=True, **options)  # type: ignore[no-any-return]
    with torch.device("meta"):
        kind: Any = type(automatic.from_config(config))

    class Smaller(kind):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for method in methods:
                method.resize(self)

    model, info = Smaller.from_pretrained(path, config=config, output_loading_info=True, **options)
    model.__class__ = kind  # which is what else is saved, and asked for
    return model, info
