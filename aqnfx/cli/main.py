"""The command line: argument parsing, exit codes, one clear line for bad input."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import typer

from aqnfx.cli import analyze, demo, diagnose, env, export, opt, plan, scan, trace
from aqnfx.errors import AqnfxError, printable

# Typer exports no name for the base of its usage errors, and where it lives differs between versions.
_UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="aqnfx",
    help="Find out what noise does to a neural network: which layers and operators are fragile, with error bars.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.command)
app.command("trace")(trace.command)
app.command("opt")(opt.command)
app.command("diagnose")(diagnose.command)
app.command("scan")(scan.command)
app.command("analyze")(analyze.command)
app.command("export")(export.command)
app.command("plan")(plan.command)
app.command("env")(env.command)


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Spinning OpenMP threads slow a busy machine several-fold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Where torchao is installed transformers imports it, and it reports every optional kernel that it cannot load.
    for name in ("torchao", "torch.utils._pytree", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if debug:
        os.environ["AQNFX_DEBUG"] = "1"


def main() -> None:
    """Run the command line; exits 0 on success, 2 on bad input, 130 when interrupted."""
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except _UsageError as error:
        if len(sys.argv) <= 1:  # no command: the help, not a complaint
            error.show()
        else:
            print(f"aqnfx: {' '.join(error.format_message().split()).rstrip('.')}; see aqnfx --help", file=sys.stderr)
        sys.exit(error.exit_code)
    except AqnfxError as error:
        if os.environ.get("AQNFX_DEBUG"):
            raise
        print(f"aqnfx: {printable(' '.join(str(error).splitlines()[:1]))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("aqnfx: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


if __name__ == "__main__":
    main()
