import sys

from mugv_ds.cli.coordinate_check import main

if __name__ == "__main__":
    sys.exit(main())
