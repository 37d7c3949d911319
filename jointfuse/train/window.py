"""What a training logs: figures summed over the steps since the last line."""

import math
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from jointfuse.data.batch import Batch
from jointfuse.errors import UserError
from jointfuse.train.progress import peak_memory
from jointfuse.train.run_folder import SKIPPED

if TYPE_CHECKING:
    from jointfuse.train.loop import Trainer


class Window:
    """Figures since the last log line, summed on the device and read by the host only when a line is due."""

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer
        self._clear()

    def _clear(self) -> None:
        # L_ERC, L_ICL, cut texts, cut clips, skipped; keys, anchors, counted anchors, positives, negatives and their
        # similarity
        self.sums = torch.zeros(12, device=self.trainer.device)
        self.step = torch.zeros_like(self.sums)  # of the step that is not over yet
        self.steps, self.broken, self.utterances = 0, 0, 0
        self.started, self.waited = time.monotonic(), self.trainer.waited.seconds

    def add(self, losses: dict[str, torch.Tensor], batch: Batch) -> None:
        self.step[0] += losses["erc"]
        self.step[1] += losses["icl"]
        self.step[2] += batch.cut_tokens
        self.step[3] += batch.cut_audio
        self.step[4] += len(batch.skipped)
        if "statistics" in losses:
            *sizes, positives, negatives, positive, negative = losses["statistics"]
            pairs = [positives, negatives, positive * positives, negative * negatives]
            self.step[5:] += torch.stack([*sizes, *pairs])

    def end_step(self, total: int, taken: bool) -> None:
        """Of a step that the optimizer did not take only what was cut and skipped is counted."""
        if not taken:
            self.broken += 1
            self.step[:2], self.step[5:] = 0, 0
        self.sums += self.step
        self.step.zero_()
        self.steps += taken
        self.utterances += total

    def flush(self) -> None:
        """Means over ranks and steps to the log. Raises UserError where the loss is no longer finite."""
        if not self.steps and not self.broken:
            return
        trainer, position = self.trainer, self.trainer.position
        dist.all_reduce(self.sums)
        erc, icl, cut_texts, cut_clips, skipped, *pools = self.sums.tolist()
        micro_steps = trainer.world_size * trainer.division.accumulation * self.steps
        erc, icl = (erc / micro_steps, icl / micro_steps) if self.steps else (math.nan, math.nan)
        loss = erc + trainer.config.loss.icl_weight * icl
        if self.steps and not math.isfinite(loss):
            raise trainer.diverged(f"step {position.step} or one before it: the loss is not finite")
        self._count_skipped(int(skipped))
        elapsed = time.monotonic() - self.started
        rate = self.utterances / elapsed
        trainer.display.figures(position.step, position.epoch, loss, rate)
        if trainer.log:
            norm = trainer.engine.get_global_grad_norm()
            trainer.log.write(
                "train",
                position.step,
                epoch=position.epoch,
                loss=loss if self.steps else None,
                loss_erc=erc if self.steps else None,
                loss_icl=icl if self.steps else None,
                learning_rate=trainer.engine.optimizer.param_groups[0]["lr"],
                gradient_norm=float(norm) if norm is not None and math.isfinite(norm) else None,
                utterances_per_second=rate,
                data_wait=(trainer.waited.seconds - self.waited) / elapsed,
                peak_memory_gib=peak_memory(),
                cut_texts=int(cut_texts),
                cut_clips=int(cut_clips),
                skipped=int(skipped),
                broken=self.broken,
                **(_pool_figures(pools, micro_steps) if trainer.engine.module.contrast and self.steps else {}),
            )
        self._clear()

    def _count_skipped(self, skipped: int) -> None:
        trainer = self.trainer
        trainer.skipped += skipped
        utterances, most = len(trainer.plan.lengths), trainer.config.data.most_skipped
        if trainer.skipped > most * utterances:
            raise UserError(
                f"{trainer.skipped} of {utterances} utterances could not be read so far in epoch "
                f"{trainer.position.epoch + 1}, more than data.most_skipped = {most}; {trainer.run / SKIPPED} names "
                f"them; mend the corpus (`tools/verify_shards.py {trainer.corpus.path}`) and go on with --resume"
            )


def _pool_figures(sums: list[float], pools: int) -> dict[str, float | None]:
    """What the contrastive loss met: means over pools, and over all pairs of an anchor and a key."""
    keys, anchors, counted, positives, negatives, positive, negative = sums
    return {
        "pool": keys / pools,
        "counted_anchors": counted / pools,
        "share_without_partner": 1 - counted / anchors,
        "positive_similarity": positive / positives if positives else None,
        "negative_similarity": negative / negatives if negatives else None,
    }
