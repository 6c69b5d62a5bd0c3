"""`python -m trl_tpgrpo.rewards.serving` serves reward functions where the package's own dependencies are not installed."""

import sys

from .program import main


sys.exit(main(sys.argv[1:]))
