"""``python -m loglik``."""

from loglik.cli import main

main()
