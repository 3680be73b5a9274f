"""One call of a live model: what holds while it runs, in its thread alone, and whether Dynamo captured all of it."""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import GraphModule

RECOMPILATIONS = 1024
"""How often Dynamo may compile a piece of code of an instrumented model. After its own limit, 8, it goes on without noise."""
_patches = threading.local()


@dataclass(slots=True, eq=False)
class LiveCall:
    """A call of a model from outside: ``run`` is int32 (3,), its seed, step and row offset, None for those set last.

    ``graphs`` are those that ran so far, ``last`` is the module whose graph ran last, ``python`` are the modules that Python
    called one by one, because Dynamo broke the graph around them.
    """

    run: Tensor | None = None
    graphs: dict[Any, None] = field(default_factory=dict)
    last: str = ""
    python: set[str] = field(default_factory=set)

    @property
    def whole(self) -> bool:
        """Whether all that the model computed was in a graph."""
        return bool(self.graphs) and all(graph.whole for graph in self.graphs)

    @property
    def missed(self) -> set[str]:
        """The modules that ran, and none of whose operations was in a graph."""
        return set() if self.whole else self.python.difference(*(graph.modules for graph in self.graphs))


def capturing() -> AbstractContextManager[Any]:
    """Return a context in which Dynamo captures everything or raises: without it, it goes on without noise, and silently.

    Hooks that are registered or removed later are seen, and what it gives up at its limit of compilations is an error.
    """
    limit = RECOMPILATIONS
    known = getattr(_patches, "known", None)
    if known is None or known[0] != limit:  # kept: making one costs more than entering it
        config = torch._dynamo.config
        patch = config.patch(
            recompile_limit=max(limit, config.recompile_limit), fail_on_recompile_limit_hit=True, suppress_errors=False,
            accumulated_recompile_limit=max(limit, config.accumulated_recompile_limit), skip_nnmodule_hook_guards=False,
        )  # fmt: skip
        known = _patches.known = (limit, patch)
    made: AbstractContextManager[Any] = known[1]
    return made


def own_code(entry: nn.Module) -> types.FunctionType:
    """Return a function (module, arguments) that calls a module, with a code object of its own.

    Dynamo keeps what it compiled with the code object: one for every instrumented module.
    """
    return types.FunctionType(_call.__code__.replace(co_name=f"call_{type(entry).__name__}"), _call.__globals__)


def _call(model: Any, /, *args: Any, **kwargs: Any) -> Any:
    return model._call_impl(*args, **kwargs)


def compiled(entry: nn.Module, code: types.FunctionType, **options: Any) -> Callable[..., Any]:
    """Return what calls a module compiled by :func:`own_code`, and does not keep it."""
    reference, run = weakref.ref(entry), torch.compile(code, **options)

    def call(*args: Any, **kwargs: Any) -> Any:
        return run(reference(), *args, **kwargs)

    return call


def is_whole(captured: GraphModule, roots: set[types.CodeType]) -> bool:
    """Return whether a graph that Dynamo is capturing holds all of a call of the code ``roots``; False where nobody knows."""
    reason = getattr(captured, "compile_subgraph_reason", None)
    try:
        code = InstructionTranslator.current_tx().f_code
    except AttributeError:
        return False
    return reason is not None and not reason.graph_break and code in roots


def watch(model: nn.Module, now: Callable[[], LiveCall]) -> Callable[[], None]:
    """Note in the current call which modules of ``model`` Python calls, and return what ends that.

    What Dynamo captures calls ``forward`` past this.
    """
    watched = {name: module for name, module in model.named_modules() if name and module._compiled_call_impl is None}
    made = weakref.WeakKeyDictionary[nn.Module, Callable[..., Any]]()
    for name, module in watched.items():
        made[module] = module._compiled_call_impl = _noting(name, module, now)

    def end() -> None:
        for module, call in list(made.items()):
            if module._compiled_call_impl is call:
                module._compiled_call_impl = None

    return end


def _noting(name: str, module: nn.Module, now: Callable[[], LiveCall]) -> Callable[..., Any]:
    reference = weakref.ref(module)

    def call(*args: Any, **kwargs: Any) -> Any:
        called: Any = reference()
        if not torch.compiler.is_compiling():
            now().python.add(name)
        return called._call_impl(*args, **kwargs)

    torch._dynamo.eval_frame.skip_code(call.__code__)  # the call, not what it calls
    return call
