"`python -m lmbook`: the command, where its script is not on the path. (Written by hand: no notebook can export a module of this name.)"

import sys

from lmbook.cli import main

if __name__ == "__main__": sys.exit(main())
