"""`python -m miniserve`: the same as the command `miniserve`."""

from miniserve.cli.main import main

main()
