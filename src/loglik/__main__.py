"""``python -m loglik``."""

from loglik.cli import main

if __name__ == "__main__":
    main()
