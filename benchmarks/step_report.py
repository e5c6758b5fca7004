"""The two tables of `benchmarks.train_step` in Markdown."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.eyas_step import options
from benchmarks.step_arithmetic import ProductRate, needed_operations
from benchmarks.step_case import StepCase
from benchmarks.step_worker import Ready, Turn

OURS = "eyas"
_STEP_HEAD = (
    "| shape, T, TTT | step | n | tokens/s CPU, wall | step memory, loaded | gradient | "
    "Eyas speedup CPU, wall | Eyas memory share |"
)
_BOUND_HEAD = (
    "| shape, T, TTT | sequences, supervised | needed | of which head, teacher | "
    "products CPU, wall | bound tokens/s CPU, wall | Eyas reaches CPU, wall |"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerResult:
    """Results of one peer in one case."""

    ready: Ready | None
    turns: tuple[Turn, ...]
    failure: str = ""
    """Reason why there is no (further) turn."""

    @property
    def cpu_seconds(self) -> float:
        """Return the median per step."""
        return statistics.median(turn.cpu_seconds for turn in self.turns)

    @property
    def wall_seconds(self) -> float:
        """Return the median per step."""
        return statistics.median(turn.wall_seconds for turn in self.turns)

    @property
    def step_bytes(self) -> int:
        """Return the peak above the loaded memory."""
        return max(turn.step_bytes for turn in self.turns)


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseResult:
    """All peers in one case."""

    case: StepCase
    peers: Mapping[str, PeerResult]
    rate: ProductRate


def step_table(results: Sequence[CaseResult]) -> Iterator[str]:
    """Yield the lines of the table of all peers."""
    yield _STEP_HEAD
    yield "|---" * 8 + "|"
    for result in results:
        yield from step_rows(result)


def step_rows(result: CaseResult) -> Iterator[str]:
    """Yield a row for each peer."""
    case, ours = result.case, result.peers.get(OURS)
    for name, peer in result.peers.items():
        start = f"| {_label(case)} | {name} | {len(peer.turns)} |"
        if not peer.turns:
            yield f"{start} {peer.failure} | | | | |"
            continue
        rates = _pair(case.num_tokens / peer.cpu_seconds, case.num_tokens / peer.wall_seconds)
        loaded = peer.ready.loaded_bytes if peer.ready else 0
        memory = f"{peer.step_bytes / 2**30:.2f}, {loaded / 2**30:.2f} GiB"
        note = f" (then: {peer.failure})" if peer.failure else ""
        yield f"{start} {rates}{note} | {memory} | {_against(ours, peer)} |"


def _against(ours: PeerResult | None, peer: PeerResult) -> str:
    """Return the columns that compare with our step."""
    if ours is None or not ours.turns or ours is peer:
        return " | | "
    difference = _relative_difference(peer.turns[0].gradients, ours.turns[0].gradients)
    cpu, wall = peer.cpu_seconds / ours.cpu_seconds, peer.wall_seconds / ours.wall_seconds
    share = ours.step_bytes / max(peer.step_bytes, 1)
    return f"{difference:.0e} | {cpu:.2f}x, {wall:.2f}x | {share:.0%}"


def _relative_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    wanted = torch.tensor(expected)
    return float((torch.tensor(found) - wanted).norm() / wanted.norm())


def bound_table(results: Sequence[CaseResult], *, peak: float = 0.0) -> Iterator[str]:
    """Yield the lines of the table of our step against the machine's matrix products.

    Args:
        results: of all cases.
        peak: advertised floating-point operations per second of the device, if known.

    """
    utilisation = " model-FLOPs utilisation |" if peak else ""
    yield _BOUND_HEAD + utilisation
    yield "|---" * (8 if peak else 7) + "|"
    for result in results:
        if OURS in result.peers:
            yield _bound_row(result, peak)


def _bound_row(result: CaseResult, peak: float) -> str:
    case, rate, ours = result.case, result.rate, result.peers[OURS]
    parts = needed_operations(case, options(case))
    total = sum(parts.values())
    cpu, wall = total / rate.cpu, total / rate.wall
    supervised = sum(case.loss_mask) / case.num_tokens
    cells = [
        _label(case),
        f"{len(case.lengths)}, {supervised:.0%}",
        f"{total / 1e9:,.0f} GFLOP",
        f"{parts['head'] / total:.0%}, {parts['teacher'] / total:.0%}",
        f"{rate.cpu / 1e9:.0f}, {rate.wall / 1e9:.0f} GFLOP/s",
        _pair(case.num_tokens / cpu, case.num_tokens / wall),
        f"{cpu / ours.cpu_seconds:.0%}, {wall / ours.wall_seconds:.0%}" if ours.turns else "",
    ]
    if peak:
        cells.append(f"{total / ours.wall_seconds / peak:.0%}" if ours.turns else "")
    return f"| {' | '.join(cells)} |"


def _pair(cpu: float, wall: float) -> str:
    return f"{cpu:,.1f}, {wall:,.1f}"


def _label(case: StepCase) -> str:
    return f"{case.shape.name}, {case.num_tokens}, {case.ttt_length}"
