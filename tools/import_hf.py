import sys

from mugv_ds.cli.import_hf import main

if __name__ == "__main__":
    sys.exit(main())
