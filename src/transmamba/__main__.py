"""python -m transmamba: the command line, without the installed script."""

import sys

from transmamba.cli.main import main

sys.exit(main())
