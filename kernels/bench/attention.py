"""Measures attention at head_dim 72 with every installed backend: its time, forward and backward, and its errors."""

import argparse

import torch
from harness import forward_backward, median_ms, report

from mugv_ds.models.attention import installed_backends
from mugv_ds.models.choose_attention import attention_errors, choose_attention, random_qkv

LIMIT = 5e-3  # largest relative error of a backend that is reported as right


def main() -> None:
    """Measures all backends at each number of tokens, and reports them beside FlashAttention-2 and cuDNN."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 54_000])
    parser.add_argument("--heads", type=int, default=12)
    args = parser.parse_args()
    device, dtype = torch.device("cuda"), torch.bfloat16
    backends = installed_backends(device)
    for tokens in args.tokens:
        rows = []
        for name, backend in backends.items():
            try:
                errors = attention_errors(backend, tokens, dtype, device)
            except Exception as error:
                rows.append({"backend": name, "failure": f"{type(error).__name__}: {str(error)[:80]}"})
                continue
            *qkv, _ = random_qkv(tokens, args.heads, dtype, device)
            with torch.no_grad():
                forward = median_ms(lambda backend=backend, qkv=qkv: backend(*qkv))
            both = median_ms(forward_backward(backend, qkv), seconds=2.0)
            flops = 4.0 * tokens**2 * args.heads * 72
            rows.append(
                {
                    "backend": name,
                    "forward ms": forward,
                    "forward+backward ms": both,
                    "TFLOP/s": 3.5 * flops / both / 1e9,
                    **errors,
                    "right": max(errors.values()) <= LIMIT,
                }
            )
        times = {row["backend"]: row["forward+backward ms"] for row in rows if "failure" not in row}
        for row in rows:
            for other in ("flash2", "cudnn"):
                if other in times and row["backend"] in times:
                    row[f"× {other}"] = times[other] / times[row["backend"]]
        chosen, _ = choose_attention(backends, tokens=tokens, heads=args.heads, dtype=dtype, device=device)
        report(f"attention forward+backward, head_dim 72, N = {tokens}, {args.heads} heads, auto takes {chosen}", rows)


if __name__ == "__main__":
    main()
