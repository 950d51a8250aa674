"""DeepSpeed's launcher of a host without what it logs: `cli.launch` says what a person needs of it."""

import logging
import runpy

if __name__ == "__main__":
    logging.disable(logging.ERROR)
    runpy.run_module("deepspeed.launcher.launch", run_name="__main__", alter_sys=True)
