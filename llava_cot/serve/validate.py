"""Check the JSON of a request against its schema, and say what is wrong in one sentence."""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from llava_cot.serve.errors import RequestError

Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], data: Any) -> Model:
    """Return ``data`` as ``model``.

    Raises:
        RequestError: the first thing that is wrong, with the path of its field.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # Of the alternatives of a field, the one that got furthest is the one that was meant.
        problem = max(error.errors(include_url=False, include_context=False), key=lambda one: len(one["loc"]))
        path = _path(problem["loc"], data)
        if problem["type"] in ("extra_forbidden", "none_required"):  # a field that is taken only as null
            message = f"{path} is not a field that this server knows"
        elif problem["type"] == "missing":
            message = f"{path} must be given"
        else:
            message = f"{path or 'the request'} is wrong: {problem['msg'][:200]}"
        raise RequestError(400, message, path or None, problem["type"]) from None


def _path(loc: tuple[int | str, ...], data: Any) -> str:
    """Return the path of a field in ``data``. pydantic's names of alternatives are left out."""
    path = ""
    for at, key in enumerate(loc):
        is_last = at == len(loc) - 1
        if isinstance(key, int) and isinstance(data, list):
            path += f"[{key}]"
            data = data[key] if 0 <= key < len(data) else None
        elif isinstance(key, str) and isinstance(data, dict) and (key in data or is_last):
            path += f".{key[:64]}" if path else key[:64]
            data = data.get(key)
    return path
