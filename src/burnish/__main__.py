"""`python -m burnish`: the program, where its script is not on the path, as under torchrun."""

from __future__ import annotations

from burnish.cli.main import main

if __name__ == "__main__":
    main()
