"""Measures cross-attention of the 10B's block, compiled, with every backend: its time, and its errors against fp64."""

from unittest.mock import patch

import torch
from harness import forward_backward, median_ms, report

from mugv_ds.models import attention
from mugv_ds.models.choose_attention import among_padding, attention_errors, random_qkv

N, TEXT_TOKENS, HEADS = 54_002, 300, 48


def main() -> None:
    """Measures every backend; FlashAttention-4 also with its queries in one part."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    mask = torch.arange(TEXT_TOKENS, device=device) % 7 != 6
    everything = torch.ones_like(mask)[None]
    backends = attention.installed_masked_backends(device)
    trials = [(name, backend, attention.query_parts) for name, backend in backends.items()]
    if "flash4" in backends:
        trials.append(("flash4, queries in one part", backends["flash4"], lambda *_: 1))
    rows = []
    for name, backend, parts in trials:
        with patch.object(attention, "query_parts", parts):
            torch.compiler.reset()
            compiled = torch.compile(backend, dynamic=False)
            *inputs, _ = random_qkv(N, HEADS, dtype, device, TEXT_TOKENS)
            with torch.no_grad():
                forward = median_ms(lambda call=compiled, qkv=inputs: call(*qkv, everything))
            both = median_ms(forward_backward(lambda *qkv, call=compiled: call(*qkv, everything), inputs), seconds=2.0)
            errors = attention_errors(among_padding(backend, mask), N, dtype, device, int(mask.sum()))
        flops = 4.0 * N * TEXT_TOKENS * HEADS * 72
        rows.append(
            {
                "backend": name,
                "forward ms": forward,
                "forward+backward ms": both,
                "TFLOP/s": 3.5 * flops / both / 1e9,
                **errors,
            }
        )
    report(f"cross-attention forward+backward, {N} tokens, {TEXT_TOKENS} text tokens, {HEADS} heads, bf16", rows)


if __name__ == "__main__":
    main()
