import sys

from mugv_ds.cli.goodput import main

if __name__ == "__main__":
    sys.exit(main())
