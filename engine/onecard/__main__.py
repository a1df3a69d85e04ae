"""`python -m onecard` is `onecard`."""

from onecard.commands.cli import main

main()
