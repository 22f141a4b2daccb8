"""`python -m tpserve.frontend`: the companion process of rank 0. `cluster.discovery.spawn_frontend` starts it; users do not."""

import sys

from tpserve.frontend.process import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
