import sys

from mugv_ds.cli.make_rdpo_pairs import main

if __name__ == "__main__":
    sys.exit(main())
