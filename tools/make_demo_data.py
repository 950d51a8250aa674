import sys

from mugv_ds.cli.make_demo_data import main

if __name__ == "__main__":
    sys.exit(main())
