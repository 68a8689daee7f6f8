"""`python -m hf_flash_two`: see `doctor`."""

import sys

from hf_flash_two.doctor import main

if __name__ == "__main__":
    sys.exit(main())
