"""`python -m lipbounds` is the command `lipbounds`."""

from lipbounds.cli import main


main()
