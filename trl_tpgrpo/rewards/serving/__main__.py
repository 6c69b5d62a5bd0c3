"""`python -m trl_tpgrpo.rewards.serving` serves reward functions without the package's other dependencies."""

import sys

from .program import main


sys.exit(main(sys.argv[1:]))
