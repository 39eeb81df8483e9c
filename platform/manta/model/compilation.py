"""Functions compiled whole, once per process."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of tensors in its compiled form; its first call compiles it.

    It compiles once for each shape, dtype and grad mode. Past the limit, torch would silently take
    the slow path; `fullgraph` makes that an error.
    """
    return torch.compile(  # type: ignore[call-overload]  # its overloads lack the limit
        function, dynamic=False, fullgraph=True, **recompile_limit(64)
    )


def recompile_limit(limit: int, compiler: Callable[..., Any] = torch.compile) -> dict[str, int]:
    """Returns the keyword argument of `compiler` that allows `limit` compilations of one function.

    Versions of torch before 2.13 have no such keyword. With them, this sets the limit for the whole
    process and returns {}.
    """
    if "recompile_limit" in inspect.signature(compiler).parameters:
        return {"recompile_limit": limit}
    import torch._dynamo.config as config

    config.recompile_limit = max(config.recompile_limit, limit)
    return {}
