import sys

from mugv_ds.cli.verify_dataset import main

if __name__ == "__main__":
    sys.exit(main())
