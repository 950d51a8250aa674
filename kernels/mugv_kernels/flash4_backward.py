"""A pipelined main loop for FlashAttention-4's backward kernel on Hopper, at head dimensions from 65 to 96.

For a block of keys and each block of queries in turn the library computes

    S = Q·Kᵀ, dP = dO·Vᵀ;  P = exp(S − lse), dS = P∘(dP − Σ);  dV += Pᵀ·dO, dQ = dS·K, dK += dSᵀ·Q

in that order (Dao 2023, FlashAttention-2, algorithm 2; Σ is the row sum of dO∘O), so that one of the five products runs
while exponentials are computed and none while dS is. Here the scores of the next block are issued before dQ and dK of
this one:

    tensor cores                                  meanwhile
    dV += Pᵀ·dO                                   dS = P∘(dP − Σ), to shared memory
    S' = Q'·Kᵀ
    dQ = dS·K, dK += dSᵀ·Q, dP' = dO'·Vᵀ          P' = exp(S' − lse'), dQ to shared memory

Loading, the reduction of dQ over blocks of keys, and the epilogue are the library's. Scores of keys past the end are
masked in the last block only, whereas the library compares in every block.

Names are the library's: m is the block of queries, n the block of keys, d and dv the head dimensions of Q, K and of V;
acc_X is an accumulator in registers, sX a tensor in shared memory, rX in registers, mX in global memory.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32
from cutlass.cute.nvgpu import warpgroup
from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
from flash_attn.cute.named_barrier import NamedBarrierBwd
from flash_attn.cute.utils import cvt_f16
from quack import copy_utils, layout_utils, sm90_utils

# Stages (buffers) of Q, dO and dS in shared memory; the library takes two. The next block's Q is read for its scores
# while this block's Q is still wanted for dK, and a third stage lets the copy of the block after those run already.
STAGES = 3


class PipelinedBackward(FlashAttentionBackwardSm90):
    """The library's backward kernel with the loop above, for bidirectional attention of samples of one length.

    It takes the tile that the library uses at these head dimensions: P and dS stay in registers as operands of dV and
    dK, and the first warp group computes all of dQ.

    Raises:
        NotImplementedError: the arguments ask for another kind of attention, or give another tile.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        plain = (
            not (self.is_causal or self.is_local or self.deterministic or self.has_aux_tensors)
            and self.qhead_per_kvhead == 1
            and (self.score_mod, self.score_mod_bwd, self.mask_mod) == (None, None, None)
        )
        tile = self.mma_dkv_is_rs and self.num_wg_dQ == 1 and self.Q_stage == self.dO_stage == self.PdS_stage > 2
        if not (plain and tile):
            raise NotImplementedError("this kernel is for plain bidirectional attention at head dimensions 65 to 96")

    @cute.jit
    def mma(
        self,
        tiled_mma_SdP: cute.TiledMma,
        tiled_mma_dK: cute.TiledMma,
        tiled_mma_dV: cute.TiledMma,
        tiled_mma_dQ: cute.TiledMma,
        mdK: cute.Tensor,
        mdV: cute.Tensor,
        mdK_semaphore,
        mdV_semaphore,
        mdQaccum: cute.Tensor,
        sQ: cute.Tensor,
        sK: cute.Tensor,
        sV: cute.Tensor,
        sdO: cute.Tensor,
        sP,
        sdS: cute.Tensor,
        sLSE: cute.Tensor,
        sdPsum: cute.Tensor,
        sdQaccum: cute.Tensor,
        pipeline_Q: cutlass.pipeline.PipelineAsync,
        pipeline_dO: cutlass.pipeline.PipelineAsync,
        tidx: Int32,
        tma_atom_dK: cute.CopyAtom,
        tma_atom_dV: cute.CopyAtom,
        r2s_tiled_copy_dQaccum: cute.TiledCopy,
        softmax_scale_log2: Float32,
        softmax_scale: Float32,
        block_info,
        SeqlenInfoCls: Callable,
        AttentionMaskCls: Callable,
        TileSchedulerCls: Callable,
        aux_data=None,
        fastdiv_mods=(None, None),
        blocksparse_tensors=None,
        qhead_per_kvhead_divmod=None,
        is_dQ_wg: cutlass.Constexpr[bool] = True,
    ):
        """Runs the matrix products of one warp group; it replaces the library's method and has its arguments."""
        warp_group = cute.arch.make_warp_uniform(tidx // self.num_threads_per_warp_group)
        first_thread = cute.make_layout(self.num_wg_mma, stride=self.num_threads_per_warp_group)(warp_group)
        thread_SdP = tiled_mma_SdP.get_slice(tidx)
        group_SdP, group_dV, group_dK = (
            mma.get_slice(first_thread) for mma in (tiled_mma_SdP, tiled_mma_dV, tiled_mma_dK)
        )
        m, n, d, dv = self.tile_m, self.tile_n, self.tile_hdim, self.tile_hdimv
        transpose = layout_utils.transpose_view

        # Sᵀ = K·Qᵀ and dPᵀ = V·dOᵀ, so that P and dS leave the accumulators in the form that dV and dK take them in.
        acc_S, tSrQ, tSrK = sm90_utils.partition_fragment_ABC(group_SdP, (m, n, d), sQ, sK, swap_AB=True)
        acc_dP, tdPrdO, tdPrV = sm90_utils.partition_fragment_ABC(group_SdP, (m, n, dv), sdO, sV, swap_AB=True)
        acc_dV, _, tdVrdO = sm90_utils.partition_fragment_ABC(group_dV, (n, dv, m), None, transpose(sdO))
        acc_dK, _, tdKrQ = sm90_utils.partition_fragment_ABC(group_dK, (n, d, m), None, transpose(sQ))
        acc_dQ = tdQrdS = tdQrK = tdQsdQ = None
        if cutlass.const_expr(is_dQ_wg):
            acc_dQ, tdQrdS, tdQrK = sm90_utils.partition_fragment_ABC(
                tiled_mma_dQ.get_slice(0), (m, d, n), sdS, transpose(sK)
            )
            tdQsdQ = r2s_tiled_copy_dQaccum.get_slice(tidx).partition_D(sdQaccum)
        copy_dS, _, _ = copy_utils.get_smem_store_C(
            tiled_mma_SdP, transpose(sdS), tidx, transpose=True, position_independent=True,
            major_mode_size=n // self.num_wg_mma,
        )  # fmt: skip
        tSsLSE, tSsdPsum = (
            layout_utils.mma_partition_C_vec(s, thread_SdP, expand_shape=n, is_colvec=False) for s in (sLSE, sdPsum)
        )
        loop = _Loop(
            mma_SdP=tiled_mma_SdP, mma_dV=tiled_mma_dV, mma_dK=tiled_mma_dK, mma_dQ=tiled_mma_dQ,
            acc_S=acc_S, acc_dP=acc_dP, acc_dV=acc_dV, acc_dK=acc_dK, acc_dQ=acc_dQ,
            rP=cute.make_rmem_tensor(layout_utils.reshape_acc_to_frgA(acc_S).shape, self.dtype),
            tSrK=tSrK, tSrQ=tSrQ, tdPrV=tdPrV, tdPrdO=tdPrdO, tdVrdO=tdVrdO, tdKrQ=tdKrQ, tdQrdS=tdQrdS, tdQrK=tdQrK,
            tdQsdQ=tdQsdQ, tSsLSE=tSsLSE, tSsdPsum=tSsdPsum, copy_dS=copy_dS,
            pipeline_Q=pipeline_Q, pipeline_dO=pipeline_dO, scale_log2=softmax_scale_log2, dtype=self.dtype,
            dS_written=cutlass.pipeline.NamedBarrier(int(NamedBarrierBwd.PdS), self.num_mma_threads),
            dQ_threads=self.num_threads_per_warp_group + cute.arch.WARP_SIZE,
        )  # fmt: skip

        stage = cutlass.pipeline.make_pipeline_state(cutlass.pipeline.PipelineUserType.Consumer, self.Q_stage)
        scheduler = TileSchedulerCls()
        work = scheduler.initial_work_tile_info()
        while work.is_valid_tile:
            n_block, head, batch, _ = work.tile_idx
            seqlen = SeqlenInfoCls(batch)
            first, last = block_info.get_m_block_min_max(seqlen, n_block)
            mask = partial(
                self.mask_scores,
                acc_S,
                AttentionMaskCls(seqlen),
                thread_SdP,
                n_block,
                (n_block + 1) * n > seqlen.seqlen_k,
            )
            acc_dV.fill(0.0)
            acc_dK.fill(0.0)
            loop.begin(stage, mask)
            for _ in cutlass.range(last - first - 1, unroll=1):
                stage = loop.step(stage, mask)
            stage = loop.end(stage)
            acc_dK.store(acc_dK.load() * softmax_scale)
            self.epilogue_dKV(
                acc_dV, mdV, sV, acc_dK, mdK, sK, seqlen, tma_atom_dK, tma_atom_dV, tiled_mma_dK, tiled_mma_dV,
                tidx, n_block, head, batch, qhead_per_kvhead_divmod, mdK_semaphore, mdV_semaphore,
            )  # fmt: skip
            scheduler.advance_to_next_work()
            work = scheduler.get_current_work()
        if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 4:  # the one that stores dV and dK
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def mask_scores(self, acc_S: cute.Tensor, mask, thread_SdP, n_block: Int32, is_short: Boolean):
        """Sets scores of keys past the end to −∞, in a block that has some."""
        if is_short:
            mask.apply_mask(acc_S, 0, 0, 0, n_block, thread_SdP, mask_seqlen=True, mask_causal=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loop:
    """Holds one warp group's operands, and takes a block of keys through all blocks of queries.

    tXrY is the operand Y of the product X in registers or as a descriptor, tXsY a partition of Y in shared memory.
    Products run asynchronously and finish in the order in which they are issued.
    """

    mma_SdP: cute.TiledMma
    mma_dV: cute.TiledMma
    mma_dK: cute.TiledMma
    mma_dQ: cute.TiledMma
    acc_S: cute.Tensor  # becomes P
    acc_dP: cute.Tensor  # becomes dS
    acc_dV: cute.Tensor
    acc_dK: cute.Tensor
    acc_dQ: cute.Tensor | None  # None in the warp group that does not compute dQ
    rP: cute.Tensor  # P in 16 bits
    tSrK: cute.Tensor
    tSrQ: cute.Tensor
    tdPrV: cute.Tensor
    tdPrdO: cute.Tensor
    tdVrdO: cute.Tensor
    tdKrQ: cute.Tensor
    tdQrdS: cute.Tensor | None
    tdQrK: cute.Tensor | None
    tdQsdQ: cute.Tensor | None
    tSsLSE: cute.Tensor
    tSsdPsum: cute.Tensor
    copy_dS: Callable
    pipeline_Q: cutlass.pipeline.PipelineAsync
    pipeline_dO: cutlass.pipeline.PipelineAsync
    scale_log2: Float32
    dtype: type[cutlass.Numeric]
    dS_written: cutlass.pipeline.NamedBarrier
    dQ_threads: int

    def begin(self, stage, mask: Callable[[], None]) -> None:
        """Computes P and dP of the first block of queries."""
        self._issue_scores(stage)
        self._issue_dP(stage)
        warpgroup.wait_group(1)
        mask()
        self._exponentials(stage)
        warpgroup.wait_group(0)

    def step(self, stage, mask: Callable[[], None]):
        """Goes from P and dP of one block to those of the next, adding its dV, dK and dQ; returns the next's stage."""
        following = stage.clone()
        following.advance()
        self._issue_dV(stage)
        rdS = self._dS(stage)
        self._issue_scores(following)
        self._issue_dQ_dK(rdS, stage)
        warpgroup.wait_group(1 if self.acc_dQ is None else 2)  # dV and the scores are there
        self.pipeline_dO.consumer_release(stage)
        self._issue_dP(following)
        mask()
        self._exponentials(following)
        self._hand_over_dQ(running=2)
        warpgroup.wait_group(0)
        self.pipeline_Q.consumer_release(stage)
        return following

    def end(self, stage):
        """Adds dV, dK and dQ of the last block; returns the stage that comes next."""
        self._issue_dV(stage)
        rdS = self._dS(stage)
        self._issue_dQ_dK(rdS, stage)
        self._hand_over_dQ(running=1)
        warpgroup.wait_group(0)
        self.pipeline_dO.consumer_release(stage)
        self.pipeline_Q.consumer_release(stage)
        stage.advance()
        return stage

    def _issue_scores(self, stage) -> None:
        self.pipeline_Q.consumer_wait(stage, self.pipeline_Q.consumer_try_wait(stage))
        _issue(self.mma_SdP, self.acc_S, self.tSrK, _of(self.tSrQ, stage), zero_init=True)

    def _issue_dP(self, stage) -> None:
        self.pipeline_dO.consumer_wait(stage, self.pipeline_dO.consumer_try_wait(stage))
        _issue(self.mma_SdP, self.acc_dP, self.tdPrV, _of(self.tdPrdO, stage), zero_init=True)

    def _issue_dV(self, stage) -> None:
        _issue(self.mma_dV, self.acc_dV, self.rP, _of(self.tdVrdO, stage))

    def _issue_dQ_dK(self, rdS: cute.Tensor, stage) -> None:
        if self.acc_dQ is not None:
            _issue(self.mma_dQ, self.acc_dQ, _of(self.tdQrdS, stage), self.tdQrK, zero_init=True)
        _issue(self.mma_dK, self.acc_dK, rdS, _of(self.tdKrQ, stage))

    def _exponentials(self, stage) -> None:
        """Computes P = exp2(S · scale − lse), in fp32 for dS and in 16 bits for dV; the library's lse is in base 2."""
        lse = copy_utils.load_s2r(self.tSsLSE[None, stage.index])
        p = layout_utils.reshape_acc_to_mn(self.acc_S, transpose=True)
        for row in range(cute.size(p, mode=[0])):
            for column in range(cute.size(p, mode=[1])):
                p[row, column] = cute.math.exp2(p[row, column] * self.scale_log2 - lse[row], fastmath=True)
        cvt_f16(layout_utils.reshape_acc_to_frgA(self.acc_S), self.rP)

    def _dS(self, stage) -> cute.Tensor:
        """Returns dS = P∘(dP − Σ) in 16 bits for dK; all warp groups then have it in shared memory for dQ."""
        total = copy_utils.load_s2r(self.tSsdPsum[None, stage.index])
        p, ds = (layout_utils.reshape_acc_to_mn(acc, transpose=True) for acc in (self.acc_S, self.acc_dP))
        for row in range(cute.size(ds, mode=[0])):
            for column in range(cute.size(ds, mode=[1])):
                ds[row, column] = p[row, column] * (ds[row, column] - total[row])
        rdS = cvt_f16(layout_utils.reshape_acc_to_frgA(self.acc_dP), self.dtype)
        self.copy_dS(rdS, dst_idx=stage.index)
        cute.arch.fence_view_async_shared()
        self.dS_written.arrive_and_wait()
        return rdS

    def _hand_over_dQ(self, running: int) -> None:
        """Waits until only `running` later products run, and gives dQ to the warp that sums it in global memory."""
        if self.acc_dQ is None:
            return
        warpgroup.wait_group(running)
        cute.arch.barrier(barrier_id=int(NamedBarrierBwd.dQEmptyWG0), number_of_threads=self.dQ_threads)
        flat = cute.make_tensor(self.acc_dQ.iterator, cute.make_layout(self.tdQsdQ.shape))
        cute.autovec_copy(flat, self.tdQsdQ)
        cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(barrier_id=int(NamedBarrierBwd.dQFullWG0), number_of_threads=self.dQ_threads)


def _of(operand: cute.Tensor, stage) -> cute.Tensor:
    """Returns the part of an operand that lies in this stage."""
    return operand[None, None, None, stage.index]


def _issue(mma: cute.TiledMma, acc: cute.Tensor, a: cute.Tensor, b: cute.Tensor, zero_init: bool = False) -> None:
    """Starts a matrix product, acc += a·b (or acc = a·b), without waiting for it."""
    sm90_utils.gemm(mma, acc, a, b, zero_init=zero_init, wg_wait=-1)
