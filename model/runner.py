"""Runs plans on a device: gather the rows, one forward pass, sample, append.

On CUDA nothing here waits for the device before `collect`, so a second step can be launched
while the first one runs: results are queued for pinned host memory at launch, and `collect`
waits for an event behind them. On a CPU a step is complete when `launch` returns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from model.decode import DecodeBatch, is_decode, look_up
from model.graphs import GraphRecorder
from model.network import Network
from model.operations import choose_runner_kernels
from model.rows import Rows, Samples
from model.sampling.edits import SampleRow
from model.sampling.logprobs import (
    ChosenLogprobs,
    Score,
    chosen_logprobs,
    score_in_torch,
    to_token_logprobs,
)
from model.sampling.residents import ResidentDraws
from model.sampling.sampler import Choose, Sampled, choose_by, choose_in_torch, sample
from model.sampling.table import Draw
from model.step import (
    FillMasks,
    PlanRow,
    RowResult,
    RunnerLimits,
    SamplingParams,
    StepHandle,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from model.transfer import download, send, upload_ids

PROMPT_LOGPROB_ROWS = 64  # rows of logits held at once while a prompt is scored


@dataclass(slots=True, kw_only=True)
class _Launched(StepHandle):
    """A step whose outcome is still on its way to the host.

    `sampling` is parallel to the plan's rows: by the time of `collect` a row may be another
    sequence's. `sampled` holds the rows that sample in order, 1 + drafts each; `scored` what
    there is of prompt logprobs, by index of the plan row. All tensors are in host memory.
    """

    sampling: list[SamplingParams]
    is_decode: bool
    sampled: Sampled | None = None
    scored: dict[int, list[tuple[Tensor, ChosenLogprobs]]] = field(default_factory=dict)
    is_done: torch.cuda.Event | None = None


class ModelRunner:
    """Runner over any Network, on one device.

    With `decodes_on_device`, which a network must be made for, steps in which everybody decodes
    take nothing from the host (model/decode.py), and a `recorder` makes graphs of them.
    """

    def __init__(
        self,
        network: Network,
        limits: RunnerLimits,
        device: torch.device,
        *,
        decodes_on_device: bool = False,
        recorder: GraphRecorder | None = None,
    ) -> None:
        self._network = network
        self._limits = limits
        self._device = device
        self._rows = Rows(limits, device)
        self._draws: ResidentDraws | None = None
        self._choose: Choose = choose_in_torch
        self._score: Score = score_in_torch
        kernels = choose_runner_kernels(device)
        if kernels is not None:
            self._draws = ResidentDraws(limits.max_num_seqs, device, kernels.sample_rows)
            self._choose, self._score = choose_by(kernels.sample_rows), kernels.score
        self._decode: DecodeBatch | None = None
        if decodes_on_device:
            self._decode = DecodeBatch(
                network,
                self._rows,
                look_up if kernels is None else kernels.look_up,
                self._draws,
                limits,
                device,
                recorder,
            )

    @property
    def limits(self) -> RunnerLimits:
        return self._limits

    @property
    def device(self) -> torch.device:
        return self._device

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Have built whatever the device builds at first use."""
        if self._decode is not None:
            self._decode.warm_up()
        elif self._draws is not None:
            self._draws.warm_up(self._limits.vocab_size)
        if self._draws is not None:
            one = torch.zeros(1, dtype=torch.int64, device=self._device)
            self._score(torch.zeros(1, self._limits.vocab_size, device=self._device), one)

    @torch.inference_mode()
    def capture_all(self) -> int:
        """Capture all graphs that are missing of what has been run; return how many there are."""
        if self._decode is None:
            return 0
        self._decode.capture_all()
        return self._decode.num_captured

    @torch.inference_mode()
    def launch(self, plan: StepPlan, fill_masks: FillMasks) -> StepHandle:
        """Start a step. Constraint masks are filled between forward pass and sampling."""
        self._rows.forget_notes()  # of a launch that failed
        for row in plan.removed:
            self._rows.remove(row)
        for new_row in plan.added:
            self._rows.add(new_row)
        if self._draws is not None:
            self._draws.add(plan.added)
        sampling = [self._rows[plan_row.row].sampling for plan_row in plan.rows]
        handle = _Launched(plan=plan, sampling=sampling, is_decode=is_decode(plan.rows))
        if not plan.rows:
            self._rows.send()
            return handle
        for plan_row in plan.rows:
            if plan_row.new_block_ids or plan_row.draft_token_ids:
                self._rows.extend(plan_row)
        most = None if self._draws is None else self._draws.most(plan.rows)
        decode = self._decode if handle.is_decode else None
        if decode is not None:
            sampled: Sampled | None = self._run_decode(decode, plan, most, fill_masks)
        else:
            sampled = self._run_any(handle, most, fill_masks)
        if sampled is not None:
            handle.sampled = sampled.download()
        if self._device.type == "cuda":
            handle.is_done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            handle.is_done.record()
        if decode is not None:
            decode.capture_next(len(plan.rows), most)
        return handle

    def collect(self, handle: StepHandle) -> StepResult:
        """Wait for a step and return its tokens as plain numbers."""
        assert isinstance(handle, _Launched)
        if handle.is_done is not None:
            handle.is_done.synchronize()
        outcome = _Outcome(handle.sampled)
        if handle.is_decode and outcome.is_plain:
            rows = outcome.plain_results(handle.plan.rows)
        else:
            rows = tuple(self._results(handle, outcome))
        return StepResult(step_id=handle.plan.step_id, rows=rows)

    def _results(self, handle: _Launched, outcome: "_Outcome") -> Iterator[RowResult]:
        place = 0
        for index, plan_row in enumerate(handle.plan.rows):
            num_sampled = 1 + len(plan_row.draft_token_ids) if plan_row.sample else 0
            scored = handle.scored.get(index, [])
            num_top = handle.sampling[index].logprobs
            yield outcome.row_result(plan_row, place, num_top, scored)
            place += num_sampled

    def _run_decode(
        self, decode: DecodeBatch, plan: StepPlan, most: Draw | None, fill_masks: FillMasks
    ) -> Sampled:
        """Run a step in which everybody decodes, most of it by itself."""
        decode.forward(plan.rows)
        masks = self._fill(plan, fill_masks)
        if most is not None:
            return decode.draw(len(plan.rows), most)
        logits, samples = decode.logits(len(plan.rows))
        return self._sample(plan, logits, samples, masks, None)

    def _run_any(
        self, handle: _Launched, most: Draw | None, fill_masks: FillMasks
    ) -> Sampled | None:
        """Gather any step and run it; score the prompts that ask for it."""
        plan = handle.plan
        step = self._rows.gather(plan.rows, self._network.row_tile)
        hidden = self._network.forward(step.inputs)
        for index, sampling in enumerate(handle.sampling):
            if sampling.prompt_logprobs is not None:
                first_token = step.inputs.query_starts[index]
                if scored := self._score_prompt(plan.rows[index], hidden, first_token):
                    handle.scored[index] = scored
        masks = self._fill(plan, fill_masks)
        samples = step.samples
        if samples is None:
            return None
        if samples.tokens is not None:
            padding = -len(samples.tokens) % self._network.row_tile
            hidden = hidden[torch.nn.functional.pad(samples.tokens, (0, padding))]
        logits = self._network.compute_logits(hidden)[: len(samples.rows)]
        return self._sample(plan, logits, samples, masks, most)

    def _fill(self, plan: StepPlan, fill_masks: FillMasks) -> Tensor | None:
        """Have the constraints write their masks; return them [slots, words] on the device."""
        if not plan.num_mask_slots:
            return None
        num_words = -(-self._limits.vocab_size // 32)
        masks = torch.full((plan.num_mask_slots, num_words), -1, dtype=torch.int32)
        fill_masks([memoryview(mask.numpy().view(np.uint32)) for mask in masks])
        return send(masks, self._device)

    def _sample(
        self,
        plan: StepPlan,
        logits: Tensor,
        samples: Samples,
        masks: Tensor | None,
        most: Draw | None,
    ) -> Sampled:
        """Sample the rows that ask for it and append the tokens to their logs."""
        if self._draws is not None and most is not None:
            drawn = self._draws.draw(logits, samples.rows, samples.positions, most)
            sampled = Sampled(token_ids=drawn[0], is_broken=drawn[1], logprobs=None)
        else:
            sampled = sample(logits, self._sample_rows(plan, masks), self._choose, self._score)
        self._rows.append(samples, sampled.token_ids)
        return sampled

    def _sample_rows(self, plan: StepPlan, masks: Tensor | None) -> list[SampleRow]:
        """Say of each place that is sampled whose it is, in the order of `Samples`."""
        sample_rows: list[SampleRow] = []
        logs = self._rows.token_log
        for plan_row in plan.rows:
            if not plan_row.sample:
                continue
            row = plan_row.row
            state = self._rows[row]
            num_drafts = len(plan_row.draft_token_ids)
            end = plan_row.start + plan_row.num_tokens
            for offset in range(num_drafts + 1):
                position = end - num_drafts + offset
                mask = None
                if masks is not None and plan_row.mask_slot is not None:
                    mask = masks[plan_row.mask_slot + offset]
                sample_rows.append(
                    SampleRow(
                        sampling=state.sampling,
                        position=position,
                        num_prompt_tokens=state.num_prompt_tokens,
                        token_log=logs[row, :position] if state.reads_log else self._rows.no_log,
                        mask=mask,
                    )
                )
        return sample_rows

    def _score_prompt(
        self, plan_row: PlanRow, hidden: Tensor, first_token: int
    ) -> list[tuple[Tensor, ChosenLogprobs]]:
        """Score the prompt tokens that this chunk predicts, some rows of logits at a time."""
        state = self._rows[plan_row.row]
        num_top = state.sampling.prompt_logprobs
        assert num_top is not None
        end = min(plan_row.start + plan_row.num_tokens, state.num_prompt_tokens - 1)
        scored = []
        for start in range(plan_row.logits_from, end, PROMPT_LOGPROB_ROWS):
            stop = min(start + PROMPT_LOGPROB_ROWS, end)
            offset = first_token - plan_row.start
            logits = self._logits(hidden, range(start + offset, stop + offset))
            token_ids = self._rows.token_log[plan_row.row, start + 1 : stop + 1].to(torch.int64)
            chosen = chosen_logprobs(logits, token_ids, num_top, self._score)
            scored.append((download(token_ids), chosen.download()))
        return scored

    def _logits(self, hidden: Tensor, tokens: Sequence[int]) -> Tensor:
        """Return the logits [N, V] of some of the step's tokens."""
        padded = list(tokens) + [0] * (-len(tokens) % self._network.row_tile)
        chosen = hidden[upload_ids(padded, self._device)]
        return self._network.compute_logits(chosen)[: len(tokens)]


class _Outcome:
    """What a finished step sampled, on its way into row results."""

    def __init__(self, sampled: Sampled | None) -> None:
        self._token_ids: list[int] = [] if sampled is None else sampled.token_ids.tolist()
        self._is_broken: list[bool] = [] if sampled is None else sampled.is_broken.tolist()
        self._logprobs = None if sampled is None else sampled.logprobs

    @property
    def is_plain(self) -> bool:
        """Whether there are tokens and nothing else to tell."""
        return self._logprobs is None and not any(self._is_broken)

    def plain_results(self, plan_rows: Sequence[PlanRow]) -> tuple[RowResult, ...]:
        """Return the results of rows that have one token each."""
        return tuple(
            RowResult(row=plan_row.row, token_ids=(token_id,))
            for plan_row, token_id in zip(plan_rows, self._token_ids, strict=True)
        )

    def row_result(
        self,
        plan_row: PlanRow,
        place: int,
        num_top: int | None,
        scored: list[tuple[Tensor, ChosenLogprobs]],
    ) -> RowResult:
        """Return the result of a row whose samples begin at `place`."""
        accepted: tuple[int, ...] = ()
        if plan_row.sample:
            end = place + 1 + len(plan_row.draft_token_ids)
            accepted = _accept(plan_row.draft_token_ids, self._token_ids[place:end])
        is_broken = any(self._is_broken[place : place + len(accepted)])
        if is_broken or any(bool(chosen.logprobs.isnan().any()) for _, chosen in scored):
            return RowResult(row=plan_row.row, error="the model's logits are not finite")
        logprobs: tuple[TokenLogprobs, ...] = ()
        if self._logprobs is not None and num_top is not None:
            logprobs = tuple(
                to_token_logprobs(self._logprobs, place + offset, token_id, num_top)
                for offset, token_id in enumerate(accepted)
            )
        return RowResult(
            row=plan_row.row,
            token_ids=accepted,
            logprobs=logprobs,
            prompt_logprobs=_prompt_logprobs(scored),
        )


def _prompt_logprobs(
    scored: list[tuple[Tensor, ChosenLogprobs]],
) -> tuple[TokenLogprobs, ...]:
    return tuple(
        to_token_logprobs(chosen, index, token_id, chosen.top_ids.shape[1])
        for token_ids, chosen in scored
        for index, token_id in enumerate(token_ids.tolist())
    )


def _accept(draft_token_ids: tuple[int, ...], sampled: list[int]) -> tuple[int, ...]:
    """Return the sampled ids up to and including the first that differs from its draft.

    Each was sampled as if the drafts before it were right, so the ids returned are those that
    would have come out one by one (Leviathan et al., arXiv 2211.17192, for a deterministic draft
    and common random numbers).
    """
    accepted: list[int] = []
    for index, token_id in enumerate(sampled):
        accepted.append(token_id)
        if index < len(draft_token_ids) and token_id != draft_token_ids[index]:
            break
    return tuple(accepted)
