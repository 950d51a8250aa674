import sys

from mugv_ds.cli.check_hostfile import main

if __name__ == "__main__":
    sys.exit(main())
