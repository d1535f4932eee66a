"""`python -m layerwise`, which is also what `torchrun -m layerwise` starts."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
