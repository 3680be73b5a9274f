"""The command line: argument parsing, exit codes, one clear line for bad input."""

from __future__ import annotations

import logging
import os
import sys

import typer

from aqnfx.cli import analyze, boundary, demo, diagnose, env, export, opt, plan, scan, trace

app = typer.Typer(
    name="aqnfx",
    help="Find out what noise does to a neural network: which layers and operators are fragile, with error bars.",
    epilog=boundary.EPILOG,
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


# What reports every optional kernel and package that it cannot load, and failures that this command says itself.
CHATTY = (
    "torchao", "torch.utils._pytree", "torch.onnx._internal.exporter._registration", "huggingface_hub",
)  # fmt: skip


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Spinning OpenMP threads slow a busy machine several-fold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if debug:
        os.environ["AQNFX_DEBUG"] = "1"


def main() -> None:
    """Run the command line and exit with one of :class:`~aqnfx.cli.boundary.Code`."""
    sys.exit(boundary.run(_invoke))


def _invoke() -> None:
    """Parse and run; Click's own runner is left out, which ends closed pipes and interruptions in its way."""
    command = typer.main.get_command(app)
    with command.make_context("aqnfx", sys.argv[1:]) as context:
        command.invoke(context)


if __name__ == "__main__":
    main()
