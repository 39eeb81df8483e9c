"""Functions compiled whole, once for the process."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The compilation of a function of tensors, made when it is first called.

    It compiles once for each shape, dtype and grad mode. Past the limit, `fullgraph` makes an error
    of what would be the slow path, unsaid.
    """
    return torch.compile(  # type: ignore[call-overload]  # its overloads lack the limit
        function, dynamic=False, fullgraph=True, **recompile_limit(64)
    )


def recompile_limit(limit: int, compiler: Callable[..., Any] = torch.compile) -> dict[str, int]:
    """The keyword of `compiler` that allows so many compilations of one function. Versions of
    torch before 2.13 have none: there the limit is set for the whole process, and {} returned."""
    if "recompile_limit" in inspect.signature(compiler).parameters:
        return {"recompile_limit": limit}
    import torch._dynamo.config as config

    config.recompile_limit = max(config.recompile_limit, limit)
    return {}
