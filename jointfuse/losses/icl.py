"""The inter-class contrastive loss, equation (7) of arXiv 2405.17900, over the utterances of all ranks.

Shapes: n own rows, M rows of all ranks, K keys (the M rows, and those of a queue), D width, C classes.
s_ij = z_i.z_j / tau, P(i) the other keys of i's class.

    l_i = logsumexp_{j != i} s_ij - mean_{p in P(i)} s_ip          rows with an empty P(i) are not counted
    L   = mean of l_i over the counted rows of all ranks

s is symmetric, so a rank's own gradient needs only what the forward pass gathered: every z_j and every log-sum-exp.
The backward pass has no collective. Positives are sums over classes: sum_{p in P(i)} s_ip = z_i.(C_{y_i} - z_i) / tau.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from jointfuse.losses.backends import backend as choose_backend
from jointfuse.losses.class_sums import class_sums
from jointfuse.losses.gather import gather_numbers, gather_rows, group_rank

NORM_FLOOR = 1e-12  # a row of zeros stays one, and gets no gradient
PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Statistics(NamedTuple):
    """What a pool was like; the same on every rank. Similarities are those of features, before the temperature."""

    pool: torch.Tensor  # keys
    anchors: torch.Tensor  # rows of all ranks
    counted: torch.Tensor  # those that have a partner
    positives: torch.Tensor  # pairs of an anchor and another key of its class
    negatives: torch.Tensor  # ... and of another class
    positive: torch.Tensor  # mean similarity of the positives, 0 where there are none
    negative: torch.Tensor  # ... of the negatives


class Queue(NamedTuple):
    """Past features as further keys: features (Q, D), normalised as the loss's are, and their labels (Q,)."""

    features: torch.Tensor
    labels: torch.Tensor


class Known(NamedTuple):
    """What a training loop knows beforehand. The loss then asks neither the device nor the other ranks, and the host
    waits for neither; what is not finite comes out as a loss that is not."""

    sizes: list[int]  # rows of every rank, all of them valid
    classes: int  # C; labels are 0 to C - 1


class _InterClassContrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        tau: torch.Tensor,
        labels: torch.Tensor,
        sizes: list[int],
        known_classes: int | None,
        normalize: bool,
        group: dist.ProcessGroup | None,
        backend: str,
        queue: Queue | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """features (n, D), tau (1,), labels (n,) -> this rank's share of L, statistics (7,), z (M, D), labels (M,)."""
        rank, ranks = group_rank(group), len(sizes)
        start, n, rows = sum(sizes[:rank]), sizes[rank], sum(sizes)
        norms = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=tau.dtype) if normalize else None
        z = features if norms is None else (features / norms.clamp_min(NORM_FLOOR)).to(features.dtype)
        current, current_labels = gather_rows(z, sizes, group), gather_rows(labels, sizes, group)
        pool, pool_labels = current, current_labels
        if queue is not None:
            pool = torch.cat([current, queue.features.to(current.dtype)])
            pool_labels = torch.cat([current_labels, queue.labels])
        kernels = choose_backend(backend, pool.device, pool.dtype, len(pool))

        classes, number_of_classes = pool_labels, known_classes  # (K,) 0 to C-1
        if number_of_classes is None:
            found, classes = torch.unique(pool_labels, return_inverse=True)
            number_of_classes = len(found)
        counts = _counts(classes, number_of_classes)  # (C,)
        sums = class_sums(pool, classes, len(counts), tau.dtype)  # (C, D)
        partners = counts[classes] - 1  # (K,)
        counted = partners > 0
        counted[rows:].fill_(False)  # keys of the queue are no anchors
        number = counted.sum()
        g = counted.to(tau.dtype) / number.clamp_min(1)  # (K,)
        # (C,): the weight g_i / |P(i)| that all anchors of a class have.
        w = (counts > 1).to(tau.dtype) / number.clamp_min(1) / (counts - 1).clamp_min(1)
        anchors = sums if queue is None else class_sums(current, classes[:rows], len(counts), tau.dtype)  # (C, D)

        lse = kernels.log_sum_exp(pool, start, n, tau)
        # A pool of one row has no log-sum-exp; that of a queue's key is never used: exp(s - lse) must not overflow
        # before it is multiplied by a weight of 0.
        lse = lse.masked_fill(lse.isneginf(), 0)
        every_lse = tau.new_full((len(pool),), torch.inf)  # (K,)
        every_lse[:rows] = gather_rows(lse, sizes, group)

        own = slice(start, start + n)
        mine = pool[own].to(tau.dtype)
        positive = torch.linalg.vecdot(sums[classes[own]] - mine, mine) / tau / partners[own].clamp_min(1)  # (n,)
        contrasts = positive - lse  # (n,), what is left of two large numbers
        # The second sum of the gradient is -sum_{j in P(i)} (w_i + w_j) z_j, the keys of a queue having w_j = 0.
        drawn = sums.mul(w[:, None]).addcmul_(w[:, None], anchors)  # (C, D), z_i's own part not yet taken out
        ctx.save_for_backward(pool, classes[own], drawn, w, tau, norms, g, every_lse, contrasts)
        ctx.own, ctx.ranks, ctx.kernels = own, ranks, kernels
        sizes_of_pool = torch.stack([tau.new_full((), len(pool)), tau.new_full((), rows), number.to(tau.dtype)])
        outputs = (
            torch.cat([sizes_of_pool, _pairs(pool, classes, counts, sums, anchors, rows)]),
            current,
            current_labels,
        )
        ctx.mark_non_differentiable(*outputs)
        return -ranks * torch.dot(g[own], contrasts), *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        pool, classes, drawn, w, tau, norms, g, lse, contrasts = ctx.saved_tensors
        own, n = ctx.own, ctx.own.stop - ctx.own.start
        scale = ctx.ranks * upstream / tau
        learnt = ctx.needs_input_grad[1]
        gradient, entropy = ctx.kernels.pull(pool, own.start, n, tau, lse, g, learnt)
        z = pool[own].to(tau.dtype)
        gradient.sub_(drawn[classes]).addcmul_(w[classes, None], z, value=2).mul_(scale)
        if norms is not None:
            radial = torch.linalg.vecdot(gradient, z)[:, None]
            gradient.addcmul_(radial, z, value=-1).div_(norms.clamp_min(NORM_FLOOR)).mul_(norms > NORM_FLOOR)
        tau_gradient = None
        if learnt:
            # sum_j p_ij s_ij is lse_i less the entropy of p_i.
            tau_gradient = ((torch.dot(g[own], contrasts) + entropy) * scale).reshape(tau.shape)
        return gradient.to(pool.dtype), tau_gradient, None, None, None, None, None, None, None


def _counts(classes: torch.Tensor, number: int) -> torch.Tensor:
    """(number,) int64: rows of each class. bincount would make the host wait for a GPU."""
    return classes.new_zeros(number).index_add_(0, classes, torch.ones_like(classes))


def _pairs(
    pool: torch.Tensor,
    classes: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    anchor_sums: torch.Tensor,
    rows: int,
) -> torch.Tensor:
    """(4,): positives, negatives, and the mean z_i.z_j of either, over anchors i and other keys j."""
    dtype = sums.dtype
    anchors = _counts(classes[:rows], len(counts))  # (C,)
    itself = torch.linalg.vector_norm(pool[:rows], dtype=dtype) ** 2
    same = torch.linalg.vecdot(anchor_sums, sums).sum() - itself
    other = torch.dot(anchor_sums.sum(0), sums.sum(0)) - same - itself
    positives = (anchors * (counts - 1)).sum()
    negatives = rows * (len(pool) - 1) - positives
    numbers = torch.stack([positives, negatives]).to(dtype)
    return torch.cat([numbers, torch.stack([same, other]) / numbers.clamp_min(1)])


def contrast(
    features: torch.Tensor,
    labels: torch.Tensor,
    temperature: torch.Tensor | float,
    *,
    valid: torch.Tensor | None = None,
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    queue: Queue | None = None,
    known: Known | None = None,
    finite: bool = True,
) -> tuple[torch.Tensor, Statistics, Queue]:
    """`inter_class_contrastive_loss`, what its pool was like, and the pool's rows, which a queue may take.

    Args:
        finite: raise where features or temperature are not; else the loss is not either.
    """
    if known is not None:
        assert valid is None
        assert known.sizes[group_rank(group)] == len(features)
        sizes = known.sizes
    else:
        fault = _fault(features, labels, temperature, valid)
        if fault is None and valid is not None:
            features, labels = features[valid], labels[valid]
        sizes = _agree(features, temperature, fault, finite, group_rank(group), group)
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    if isinstance(temperature, torch.Tensor):
        tau = temperature.reshape(1).to(dtype)
    else:
        tau = torch.full((1,), temperature, dtype=dtype, device=features.device)
    loss, statistics, z, z_labels = _InterClassContrast.apply(
        features, tau, labels.long(), sizes, known.classes if known else None, normalize, group, backend, queue
    )
    return loss, Statistics(*statistics.unbind()), Queue(z, z_labels)


def _fault(
    features: torch.Tensor, labels: torch.Tensor, temperature: torch.Tensor | float, valid: torch.Tensor | None
) -> str | None:
    """What is wrong with this rank's arguments, as far as it shows without reading the device."""
    if features.ndim != 2 or features.dtype not in PRECISIONS:
        return (
            f"features must be (n, D) in 16, 32 or 64 bit floating point, got {tuple(features.shape)} {features.dtype}"
        )
    if labels.shape != features.shape[:1]:
        return f"labels {tuple(labels.shape)} must be (n,) for features {tuple(features.shape)}"
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        return f"labels must be integers, got {labels.dtype}"
    if valid is not None and (valid.shape != labels.shape or valid.dtype != torch.bool):
        return f"valid must be (n,) bool for labels {tuple(labels.shape)}, got {tuple(valid.shape)} {valid.dtype}"
    if isinstance(temperature, torch.Tensor) and temperature.numel() != 1:
        return f"temperature must be one number, got a tensor of shape {tuple(temperature.shape)}"
    return None


def _agree(
    features: torch.Tensor,
    temperature: torch.Tensor | float,
    fault: str | None,
    finite: bool,
    rank: int,
    group: dist.ProcessGroup | None,
) -> list[int]:
    """Rows of each rank. Every rank raises ValueError where one cannot go on, so that none is left waiting."""
    told = torch.full((5,), math.nan, dtype=torch.float64, device=features.device)
    told[0] = -1
    if fault is None:
        bad = ~features.detach().isfinite().all(dim=1)
        first_bad = torch.cat([bad, bad.new_ones(1)]).to(torch.uint8).argmax()  # n where none is
        told[0], told[1], told[2] = len(features), features.shape[1], first_bad
        told[3] = temperature.detach().reshape(()) if isinstance(temperature, torch.Tensor) else temperature
        told[4] = PRECISIONS.index(features.dtype)
    every = gather_numbers(told, group)
    if fault is not None:
        raise ValueError(fault)
    for other, (n, _, first, tau, _) in enumerate(every):
        whose = "" if len(every) == 1 else f" of rank {other}"
        if n < 0:
            raise ValueError(f"rank {other} cannot take part in the contrastive loss: its own message says why")
        if finite and (not tau > 0 or math.isinf(tau)):
            raise ValueError(f"temperature must be positive and finite, got {tau}{whose}")
        if finite and first < n:
            raise ValueError(f"features{whose}: row {int(first)} is not finite (rows that are not valid left out)")
    for what, column in (("widths", 1), ("precisions", 4), ("temperatures", 3)):
        found = [numbers[column] for numbers in every]
        if len(set(found)) > 1 and not all(map(math.isnan, found)):
            shown = [PRECISIONS[int(number)] if column == 4 else f"{number:g}" for number in found]
            raise ValueError(f"the ranks disagree: their {what} are {', '.join(map(str, shown))}")
    return [int(numbers[0]) for numbers in every]


def inter_class_contrastive_loss(
    features: torch.Tensor,
    labels: torch.Tensor,
    temperature: torch.Tensor | float,
    *,
    valid: torch.Tensor | None = None,
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """This rank's share of the supervised contrastive loss whose pool is every rank's batch: equation (7) of
    arXiv 2405.17900, which is L_out of Khosla et al. 2020 (equation 2).

    The mean over ranks of what is returned is L, and after the gradient averaging of data-parallel training every
    parameter's gradient is that of one process holding the whole batch. Every rank of the group must call it, with
    the same upstream gradient; a rank may hold no row at all. L is 0 where no row has a partner.

    Args:
        features: (n, D) float16, bfloat16, float32 or float64; similarities are accumulated in float32, or in
            float64 where given. Half-precision features are normalised, sent and multiplied in their own precision.
        labels: (n,) integers.
        temperature: tau > 0, a number or a trainable tensor of one element; the same on every rank.
        valid: (n,) bool; false rows are neither anchors nor keys, and may hold anything.
        normalize: L2-normalise the features (Khosla et al. 2020); false: the paper's raw dot products.
        group: the ranks of the pool; all of them unless set.
        backend: `reference`, `tiled`, `triton`, or `auto`, which chooses by device and size.

    Returns:
        A scalar, float32 (float64 for float64 features).

    Raises:
        ValueError: shapes or dtypes that do not fit, features that are not finite, a temperature that is not
            positive, ranks that disagree, a group the process is not part of, a backend that cannot work here. What
            is wrong on one rank raises on all of them.
    """
    return contrast(features, labels, temperature, valid=valid, normalize=normalize, group=group, backend=backend)[0]


class Temperature(nn.Module):
    """A trained tau: exp of the parameter `logarithm` (1,).

    A module of its own, so that whoever calls it finds the parameter whole under ZeRO-3.
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(torch.tensor([math.log(start)]))

    def forward(self) -> torch.Tensor:
        return self.logarithm.float().exp()


class InterClassContrastiveLoss(nn.Module):
    """`inter_class_contrastive_loss` with a temperature that may be trained, and an optional queue of past features.

    Args:
        temperature: tau > 0; what training starts from where it is trained.
        train_temperature: its logarithm becomes the parameter `temperature.logarithm`, (1,).
        normalize, group, backend: as of the function.
        queue: Q, how many past features stay keys (0: none). An approximation: they were made by older weights, and
            nothing flows back to them. They are kept in buffers, so a checkpoint has them.
        width: D; needed with a queue.

    Attributes:
        statistics: of the last call; None before the first.
    """

    past_features: torch.Tensor  # (Q, D), the newest first
    past_labels: torch.Tensor  # (Q,)
    past_rows: torch.Tensor  # (1,), how many of them are filled

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        train_temperature: bool = False,
        normalize: bool = True,
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
        queue: int = 0,
        width: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        if queue and not width:
            raise ValueError(f"a queue of {queue} features needs their width")
        self.fixed_temperature = temperature
        self.temperature = Temperature(temperature) if train_temperature else None
        self.normalize, self.group, self.backend = normalize, group, backend
        self.queue = queue
        if queue:
            self.register_buffer("past_features", torch.zeros(queue, width))
            self.register_buffer("past_labels", torch.zeros(queue, dtype=torch.long))
            self.register_buffer("past_rows", torch.zeros(1, dtype=torch.long))
        self.statistics: Statistics | None = None
        self._filled: int | None = 0  # past_rows on the host; None: to be read

    def tau(self) -> torch.Tensor | float:
        """A tensor (1,) with a gradient where it is trained."""
        return self.temperature() if self.temperature else self.fixed_temperature

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._filled = None

    def forward(
        self,
        features: torch.Tensor,
        labels: torch.Tensor,
        valid: torch.Tensor | None = None,
        known: Known | None = None,
    ) -> torch.Tensor:
        """features (n, D), labels (n,), valid (n,) -> this rank's share of L. In training, the queue moves on, and what
        is not finite comes out as a loss that is not."""
        queue = None
        if self.queue:
            if self._filled is None:
                self._filled = int(self.past_rows)
            filled = self._filled
            queue = Queue(self.past_features[:filled].clone(), self.past_labels[:filled].clone())
        loss, self.statistics, rows = contrast(
            features,
            labels,
            self.tau(),
            valid=valid,
            normalize=self.normalize,
            group=self.group,
            backend=self.backend,
            queue=queue,
            known=known,
            finite=not self.training,
        )
        if queue is not None and self.training:
            self._enqueue(rows, queue)
        return loss

    @torch.no_grad()
    def _enqueue(self, rows: Queue, past: Queue) -> None:
        """The newest Q rows stay, newest first."""
        # Of a step that is going to be skipped nothing that is not a number may stay.
        newest = rows.features.to(past.features.dtype).nan_to_num(0.0, 0.0, 0.0)
        features = torch.cat([newest, past.features])[: self.queue]
        self.past_features[: len(features)] = features
        self.past_labels[: len(features)] = torch.cat([rows.labels, past.labels])[: self.queue]
        self.past_rows.fill_(len(features))
        self._filled = len(features)
