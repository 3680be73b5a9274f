"""What a pass is, and the contract that every pass is run under."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, ClassVar

from aqnfx.errors import PassError, SelectorError
from aqnfx.graph.program import Program, Step
from aqnfx.graph.render import op_diff
from aqnfx.graph.sites import Role, Site
from aqnfx.graph.verify import verify


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A graph rewrite; the dataclass fields are its options, ``name`` its kebab-case name (its file: verb_noun.py).

    ``needs`` names the passes that must have run before it, ``not_after`` those that must not have.

    Subclasses implement :meth:`run`, which edits the forked program's graph, and may add :meth:`requires` (checks on
    the input) and :meth:`ensures` (checks on the result). A pass holds no state between runs.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    not_after: ClassVar[tuple[str, ...]] = ()

    def requires(self, program: Program) -> None:
        """Raise :class:`PassError` if the pass cannot run on ``program``."""

    def run(self, program: Program) -> None:
        """Edit ``program.module.graph`` in place; ``program`` is a fork that nobody else holds."""
        raise NotImplementedError

    def ensures(self, program: Program) -> None:
        """Raise :class:`PassError` if the result is not what the pass promises."""

    def spec(self) -> str:
        """Return the text form: the name, and the options that differ from their defaults in braces."""
        options = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                options.append(f"{field.name}={format_option(value)}")
        return self.name + (f"{{{' '.join(options)}}}" if options else "")

    def __call__(self, program: Program) -> Program:
        """Return a rewritten fork of ``program``; the input is not changed.

        Raises :class:`PassError` where an order or option does not fit, :class:`VerificationError` where the result
        breaks a rule.
        """
        missing = [need for need in self.needs if not program.ran(need)]
        if missing:
            raise PassError(
                f"{self.name} needs {', '.join(missing)} to have run before it; history: {program.pipeline or '(none)'}"
            )
        if late := next((other for other in self.not_after if program.ran(other)), None):
            raise PassError(f"{self.name}: {late} has run; insert before lowering")
        self.requires(program)
        started = time.perf_counter()
        fork = program.fork()
        self.run(fork)
        verify(fork.module, after=self.name)
        fork.module.recompile()
        self.ensures(fork)
        step = Step(
            spec=self.spec(),
            modified=fork.fingerprint != program.fingerprint,
            seconds=time.perf_counter() - started,
            op_diff=op_diff(program.graph, fork.graph),
        )
        return dataclasses.replace(fork, history=(*program.history, step))


def format_option(value: Any) -> str:
    """Return an option value in pipeline text; strings with separators are quoted, the parts of a tuple joined by ``|``."""
    if isinstance(value, tuple):
        value = "|".join(map(str, value))
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        if '"' in value:
            raise PassError(f"option value {value!r} contains a quote, which pipeline text cannot hold")
        return value if value and not set(value) & set(" ,{}='") else f'"{value}"'
    return repr(value)


def select_or_raise(
    name: str, where: str, program: Program, *, allow_empty: bool, operands: bool = False
) -> tuple[Site, ...]:
    """Return the sites that the selector text ``where`` matches.

    Raises :class:`SelectorError` when there are none, or where operands are among them and the pass takes outputs only
    (``operands`` False): those are nodes, operands are edges.
    """
    sites = program.select(where)
    wrong = [] if operands else [site for site in sites if site.role is not Role.OUTPUT]
    if wrong:
        raise SelectorError(
            f"{name}: {where!r} also selects {len(wrong)} operands, first {wrong[0].id}; this pass takes outputs only"
        )
    if not sites and not allow_empty:
        kinds = sorted({str(site.op) for site in program.sites})
        layers = [index for _, index in program.layers]
        span = f"{min(layers)}-{max(layers)}" if layers else "none"
        raise SelectorError(
            f"{name}: {where!r} matched 0 of {len(program.sites)} sites; the model has layers {span} and the "
            f"operator kinds {', '.join(kinds)}"
        )
    return sites
