"""`python -m sparsekit` is the command `sparsekit`."""

from __future__ import annotations

from sparsekit.cli import main

if __name__ == "__main__":
    main()
