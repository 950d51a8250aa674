import sys

from mugv_ds.cli.convert_vae import main

if __name__ == "__main__":
    sys.exit(main())
