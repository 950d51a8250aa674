import sys

from mugv_ds.cli.sweep import main

if __name__ == "__main__":
    sys.exit(main())
