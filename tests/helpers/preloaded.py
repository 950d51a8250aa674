"""What ranks of tests are forked with beside their modules: what every engine finds out again, seconds in each process.

An engine imports DeepSpeed's Muon, and that all of torch.compile; and it asks which of DeepSpeed's operators could be
compiled on this host, which runs a compiler.
"""

import deepspeed.ops
import deepspeed.runtime.zero.muon.muon_optimizer

deepspeed.ops.__compatible_ops__  # noqa: B018 - kept where it is asked for first
