"""`python -m onecard` is `onecard`."""

from onecard.cli import main

main()
