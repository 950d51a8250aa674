import sys

from mugv_ds.cli.checkpoint_dir import main

if __name__ == "__main__":
    sys.exit(main())
