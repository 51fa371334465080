"""Model ids: each search is a model of its own, so that a client that can only choose a model can choose a search."""

from collections.abc import Mapping
from typing import Any

from llava_cot.search.plan import POLICIES, PRESETS, settings_of
from llava_cot.serve.errors import RequestError
from llava_cot.serve.schema import Effort

SEARCHES = (*POLICIES, *PRESETS)

# ``reasoning_effort`` -> the search, and its settings where they are not the default ones
EFFORTS: dict[Effort, tuple[str, Mapping[str, Any]]] = {
    "none": ("greedy", {}),
    "low": ("stage_beam", {}),
    "medium": ("swires", {}),
    "high": ("swires", {"candidates": 8}),
}
PLAIN = ("greedy", "sample")  # these draw one answer and do not search


class Presets:
    """The ids of one served model: ``name`` answers by ``default``, and ``name:search`` by that search."""

    def __init__(self, name: str, default: str) -> None:
        if not name:
            raise ValueError("name must not be empty: give --name")
        settings_of(default)  # raises if there is no such search
        self.name, self.default = name, default
        self.searches = {name: default, **{f"{name}:{search}": search for search in SEARCHES}}

    def search_of(self, model: str) -> str:
        """Return the search by which a model id answers.

        Raises:
            RequestError: there is no such model.
        """
        if model not in self.searches:
            message = f"model must be one that /v1/models lists, got {model[:200]!r}"
            raise RequestError(404, message, "model", "model_not_found")
        return self.searches[model]

    def resolve(self, model: str, effort: Effort | None, search: str | None) -> tuple[str, Mapping[str, Any], bool]:
        """Return the search that a request asks for, its settings, and whether the request itself has named it.

        Raises:
            RequestError: there is no such model or search, or two of the three name one.
        """
        own = self.search_of(model)
        is_preset = model != self.name
        if effort is not None and (is_preset or search is not None):
            other = "llava_cot.search" if search is not None else f"the model {model!r}"
            message = f"reasoning_effort must not be given where {other} names the search, got {effort!r}"
            raise RequestError(400, message, "reasoning_effort")
        if search is not None:
            if is_preset and search != own:
                message = f"llava_cot.search must not be another than that of the model {model!r}, got {search!r}"
                raise RequestError(400, message, "llava_cot.search")
            if search not in SEARCHES:
                message = f"llava_cot.search must be one of {[*SEARCHES]}, got {search!r}"
                raise RequestError(400, message, "llava_cot.search")
            return search, {}, True
        if effort is not None:
            return *EFFORTS[effort], False
        return own, {}, False
