"""Several `forgetless learn` commands in turn in each process that `accelerate launch` starts: one start for all."""

import json
import sys

from forgetless.cli import main

if __name__ == "__main__":
    for flags in json.loads(sys.argv[1]):
        if code := main(["learn", *flags]):
            sys.exit(code)
