"""`python -m hpo` is the command `hpo`."""

from hpo.cli import main

main()
