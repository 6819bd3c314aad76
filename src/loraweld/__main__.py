"""`python -m loraweld`."""

from loraweld.cli import main

main()
