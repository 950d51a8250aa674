"""See `mugv_ds.cli.preflight`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("mugv_ds.cli.preflight", run_name="__main__", alter_sys=True)
