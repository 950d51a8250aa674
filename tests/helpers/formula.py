"""FlashAttention-4 where it cannot run: the formula in its place."""

import itertools

import torch

from mugv_ds.models.choose_attention import exact_attention


class Formula:
    """In the place of FlashAttention-4: what its two functions compute, by the formula. Undefined gradients are NaN."""

    @classmethod
    def _flash_attn_fwd(cls, q, k, v, *, return_lse, seqused_k=None, out=None):
        o, *_ = cls._run(q, k, v, torch.zeros_like(q), seqused_k)
        o = o if out is None else out.copy_(o)
        return o, q.new_zeros(len(q), q.shape[2], q.shape[1], dtype=torch.float32), None, None, None

    @classmethod
    def _flash_attn_bwd(cls, q, k, v, o, do, log_sum, *, seqused_k=None, dq=None, dk=None, dv=None):
        assert log_sum.shape == (len(q), q.shape[2], q.shape[1])
        assert seqused_k is None or len(q) <= 256, "the library asserts something of the kind"
        gradients = cls._run(q, k, v, do, seqused_k)[1:]
        given = zip(gradients, (dq, dk, dv), strict=True)
        return tuple(gradient if out is None else out.copy_(gradient) for gradient, out in given)

    @staticmethod
    def _run(q, k, v, do, lengths):
        results = [torch.full_like(x, torch.nan) for x in (q, q, k, v)]
        for b, head in itertools.product(range(len(q)), range(q.shape[2])):
            keys = slice(None if lengths is None else int(lengths[b]))
            parts = exact_attention(q[b, :, head], k[b, keys, head], v[b, keys, head], do[b, :, head])
            for result, part in zip(results, parts, strict=True):
                result[b, : len(part), head] = part
        return tuple(results)
