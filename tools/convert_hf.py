import sys

from mugv_ds.cli.convert_hf import main

if __name__ == "__main__":
    sys.exit(main())
