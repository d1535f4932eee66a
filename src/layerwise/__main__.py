"""`python -m layerwise`, which is also what `torchrun -m layerwise` starts."""

import os
import sys

from .cli import main

if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # torch's communication threads can abort a process that is tearing itself down ("terminate called without an active
        # exception"), and torchrun would report as failed what is saved and checked: end here, with everything written
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
