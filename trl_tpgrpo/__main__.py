"""`python -m trl_tpgrpo` is the command line."""

from .cli import main


raise SystemExit(main())
