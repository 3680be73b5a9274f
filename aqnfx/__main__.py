"""``python -m aqnfx``: the command line."""

from aqnfx.cli.main import main

main()
