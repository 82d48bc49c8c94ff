"""`python -m tl_entity`: the same as the console command."""

import sys

from tl_entity.cli import main

sys.exit(main())
