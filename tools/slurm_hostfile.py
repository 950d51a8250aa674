import sys

from mugv_ds.cli.slurm_hostfile import main

if __name__ == "__main__":
    sys.exit(main())
