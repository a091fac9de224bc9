"""`python -m lbpod.cli`: the same as the `holdfast` script, for where its folder is not on the path."""

from lbpod.cli.entry import main

main()
