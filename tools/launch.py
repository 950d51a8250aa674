import sys

from mugv_ds.cli.launch import main

if __name__ == "__main__":
    sys.exit(main())
