r"""Sequences of actions, one of which deletes: what is visible after each, and generation that can take back a token.

An action appends a token to the visible prefix or, as a backspace, deletes its last one; the prompt cannot be deleted.
The next action depends on the visible prefix alone. A transformer need not start anew after a deletion: tokens that
are gone, and the backspaces, are hidden by the attention mask, and positions count what is visible
(arXiv 2306.05426, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loglik.errors import InputError
from loglik.models.batch import TokenBatch
from loglik.models.causal import CausalLM
from loglik.models.dense import output_head, target_logits
from loglik.models.protocol import ChainRule, require
from loglik.models.seq2seq import Seq2SeqLM
from loglik.models.tree_attention import TreeRow, tree_hidden

__all__ = [
    "BackspaceSamples",
    "VisibleStates",
    "backspace_logits",
    "generate_with_backspace",
    "visible_prefixes",
    "visible_states",
]


class VisibleStates(NamedTuple):
    """What each column of a batch of action sequences has left visible.

    Attributes:
        attention: (B, T, T) bool, [b, t, c]: whether the token in column c is visible once the one in t has been
            appended, itself included. Rows of backspaces and of padding see only themselves, so that no softmax is over
            nothing; nobody sees them.
        position_ids: (B, T) visible tokens before each appended one; 0 at padding.
        top: (B, T) column of the last visible token after each column: the logits that a transformer computes *there*
            are those of the state. -1 where nothing is visible, and at padding.
        length: (B, T) visible tokens after each column, the prompt included; 0 at padding.
    """

    attention: Tensor
    position_ids: Tensor
    top: Tensor
    length: Tensor


def visible_states(x: TokenBatch, *, backspace_id: int) -> VisibleStates:
    """The mask, the positions and the visible lengths that let one forward pass score a sequence with backspaces.

    Args:
        x: B rows of a prompt and actions, which begin at `starts`; padding may stand anywhere. A backspace in the
            prompt is an ordinary token.
        backspace_id: the action that deletes.

    Raises:
        InputError: for a backspace where nothing but the prompt is left.
    """
    rows, width = x.ids.shape
    died = torch.full((rows, width), width)
    top, length = torch.full((rows, width), -1), torch.zeros(rows, width, dtype=torch.long)
    positions = torch.zeros(rows, width, dtype=torch.long)
    seen = torch.zeros(rows, width, dtype=torch.bool)
    for b, walk in enumerate(_walks(x, backspace_id)):
        for step in walk.steps:
            if step.deleted is None:
                positions[b, step.column] = step.depth - 1
                seen[b, step.column] = True
            else:
                died[b, step.deleted] = step.column
            length[b, step.column], top[b, step.column] = step.depth, step.top
    columns = torch.arange(width)
    attention = (columns <= columns[:, None]) & (died[:, None, :] > columns[:, None]) & seen[:, :, None] & seen[:, None]
    attention |= torch.eye(width, dtype=torch.bool)
    device = x.ids.device
    return VisibleStates(attention.to(device), positions.to(device), top.to(device), length.to(device))


def visible_prefixes(x: TokenBatch, *, backspace_id: int) -> TokenBatch:
    """What is visible in the end: each row's prompt and what its actions have left, all of which is scored.

    Raises:
        InputError: for a backspace where nothing but the prompt is left.
    """
    kept = [
        [ids[column] for column in walk.path(walk.steps[-1].top if walk.steps else -1)]
        for ids, walk in zip(x.ids.tolist(), _walks(x, backspace_id), strict=True)
    ]
    return TokenBatch.from_lists(kept, starts=_prompt_lengths(x)).to(x.ids.device)


def backspace_logits(model: CausalLM | Seq2SeqLM, x: TokenBatch, *, backspace_id: int) -> Tensor:
    """Raw logits (B, T, V) that predict the action in each column given what is visible before it; differentiable.

    They equal those of a plain forward pass over the visible prefix. One packed pass computes every visible token once
    where the network can attend in trees; elsewhere each branch is a row of its own. The backspace has logit -inf where
    only the prompt is visible.

    Args:
        model: a causal or encoder-decoder network.
        x: B rows of a prompt and actions, which begin at `starts`; padding may stand anywhere.
        backspace_id: the action that deletes.

    Returns:
        (B, T, V) in float32 or better, zero at columns of prompt and padding.

    Raises:
        InputError: for a backspace where nothing but the prompt is left, another model, a backspace outside the
            vocabulary, or a batch without actions.
    """
    if not isinstance(model, CausalLM | Seq2SeqLM):
        raise InputError(f"backspace_logits needs a causal or encoder-decoder network, got {type(model).__name__}")
    x = x.to(model.device)
    prompts = _prompt_lengths(x)
    walks = _walks(x, backspace_id)
    wanted = [_Wanted(b, *found) for b, walk in enumerate(walks) for found in walk.actions()]
    if not wanted:
        raise InputError("no row of this batch has an action: give prompts and actions, with `starts` between them")
    if isinstance(model, CausalLM):
        empty = [state.row for state in wanted if state.depth == 0]
        if empty:
            raise InputError(f"row {empty[0]}: the first action follows on nothing: put BOS or a prompt before it")
    trees = isinstance(model, CausalLM) and model.trunk is not None and model.forward_path().path == "packed"
    found = _in_trees(model, x, walks, wanted) if trees else _by_branches(model, x, walks, prompts, wanted)
    vocabulary = found.shape[-1]
    if not 0 <= backspace_id < vocabulary:
        raise InputError(f"the backspace, token {backspace_id}, is no token of the vocabulary of {vocabulary}")
    stuck = torch.tensor([state.depth == prompts[state.row] for state in wanted], device=found.device)
    gone = torch.arange(vocabulary, device=found.device) == backspace_id
    found = found.masked_fill(stuck[:, None] & gone, -math.inf)
    at = torch.tensor([(state.row, state.column) for state in wanted], device=found.device)
    return found.new_zeros(*x.ids.shape, vocabulary).index_put((at[:, 0], at[:, 1]), found)


@dataclass(frozen=True, slots=True)
class BackspaceSamples:
    """Generated sequences.

    Args:
        actions: prompt and all actions, backspaces among them; the actions are scored.
        visible: prompt and what is left in the end; that is scored.
        ended: (B,) bool, True where EOS ended the row, False where the cap on actions did.
    """

    actions: TokenBatch
    visible: TokenBatch
    ended: Tensor


@torch.no_grad()
def generate_with_backspace(
    model: ChainRule,
    prompt: TokenBatch,
    *,
    backspace_id: int,
    max_actions: int = 64,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> BackspaceSamples:
    """Ancestral samples of actions, each given what is visible: a token is appended, or the last one deleted.

    The distribution is the model's own, but for the backspace where only the prompt is visible, which is impossible
    there and whose probability goes to the other actions in proportion.

    Args:
        model: gives the distribution of the next token after a row.
        prompt: B rows to continue.
        backspace_id: the action that deletes.
        max_actions: at most, EOS and backspaces counted: insertions and deletions could go on for ever.
        eos_id: the token that ends a row; the tokenizer's by default, if there is one.
        generator: of the random numbers, on the CPU.

    Raises:
        InputError: for a model without next-token probabilities, a cap below 1, a backspace that is EOS or outside the
            vocabulary, or a state with no possible action.

    Source: arXiv 2306.05426.
    """
    chain = require(model, ChainRule, "generate_with_backspace")  # type: ignore[type-abstract]
    eos = eos_id if eos_id is not None else getattr(getattr(model, "tokenizer", None), "eos_token_id", None)
    if max_actions < 1:
        raise InputError(f"generate_with_backspace: max_actions must be at least 1, got {max_actions}")
    if backspace_id == eos:
        raise InputError(f"generate_with_backspace: token {backspace_id} cannot both delete and end the sequence")
    prompts = [ids[real].tolist() for ids, real in zip(prompt.ids, prompt.attention_mask, strict=True)]
    actions: list[list[int]] = [[] for _ in prompts]
    visible: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    starts = [len(row) for row in prompts]
    for _ in range(max_actions):
        live = [b for b, end in enumerate(ended) if not end]
        if not live:
            break
        seen = TokenBatch.from_lists([prompts[b] + visible[b] for b in live], starts=[starts[b] for b in live])
        log_probs = chain.next_log_probs(seen).cpu()
        if not 0 <= backspace_id < log_probs.shape[-1]:
            raise InputError(f"the backspace, token {backspace_id}, is no token of the vocabulary of the model")
        stuck = torch.tensor([not visible[b] for b in live])
        gone = torch.arange(log_probs.shape[-1]) == backspace_id
        log_probs = log_probs.masked_fill(stuck[:, None] & gone, -math.inf)
        hopeless = (~(log_probs.amax(-1) > -math.inf)).nonzero().flatten()
        if len(hopeless):
            raise InputError(f"generate_with_backspace: row {live[int(hopeless[0])]} has no possible action")
        drawn = torch.multinomial(log_probs.softmax(-1), 1, generator=generator).flatten().tolist()
        for b, token in zip(live, drawn, strict=True):
            actions[b].append(token)
            if token == backspace_id:
                visible[b].pop()
            else:
                visible[b].append(token)
            ended[b] = token == eos
    return BackspaceSamples(
        TokenBatch.from_lists([p + a for p, a in zip(prompts, actions, strict=True)], starts=starts),
        TokenBatch.from_lists([p + v for p, v in zip(prompts, visible, strict=True)], starts=starts),
        torch.tensor(ended, dtype=torch.bool),
    )


class _Step(NamedTuple):
    """One real token of a row."""

    column: int
    top: int  # column of the last visible token after it; -1 for none
    depth: int  # visible tokens after it
    deleted: int | None  # the column whose token it deletes
    acts: bool  # it is an action, not a token of the prompt


@dataclass(frozen=True, slots=True)
class _Walk:
    """One row, token by token, and the column below each appended token (-1 below the first)."""

    steps: list[_Step]
    below: dict[int, int]

    def path(self, top: int) -> list[int]:
        """Columns of the visible tokens up to one of them."""
        columns = []
        while top >= 0:
            columns.append(top)
            top = self.below[top]
        return columns[::-1]

    def actions(self) -> Iterator[tuple[int, int, int]]:
        """Column of each action, with top and depth of the state it is taken in."""
        top, depth = -1, 0
        for step in self.steps:
            if step.acts:
                yield step.column, top, depth
            top, depth = step.top, step.depth


class _Wanted(NamedTuple):
    """An action whose logits are asked for, and the state it is taken in."""

    row: int
    column: int
    top: int
    depth: int


def _walks(x: TokenBatch, backspace_id: int) -> list[_Walk]:
    walks = []
    starts = x.completion_starts().tolist()
    for b, (ids, real, start) in enumerate(zip(x.ids.tolist(), x.attention_mask.tolist(), starts, strict=True)):
        walk, top, depth = _Walk([], {}), -1, 0
        prompt = sum(real[:start])
        for column, token in enumerate(ids):
            if not real[column]:
                continue
            deleted = None
            if column < start or token != backspace_id:
                walk.below[column] = top
                top, depth = column, depth + 1
            elif depth == prompt:
                raise InputError(f"row {b}: the backspace in column {column} has nothing to delete: the prompt stays")
            else:
                deleted, top, depth = top, walk.below[top], depth - 1
            walk.steps.append(_Step(column, top, depth, deleted, column >= start))
        walks.append(walk)
    return walks


def _prompt_lengths(x: TokenBatch) -> list[int]:
    """Real tokens before the first action of each row."""
    columns = torch.arange(x.ids.shape[1], device=x.ids.device)
    found: list[int] = (x.attention_mask & (columns < x.completion_starts()[:, None])).sum(1).tolist()
    return found


def _in_trees(model: CausalLM | Seq2SeqLM, x: TokenBatch, walks: list[_Walk], wanted: list[_Wanted]) -> Tensor:
    """(N, V) logits from one packed pass: a row's appended tokens are a tree, in the order of its depth-first walk."""
    assert model.trunk is not None
    place: dict[tuple[int, int], int] = {}
    ends: list[int] = []
    depths: list[int] = []
    groups = []
    for b, walk in enumerate(walks):
        begin = len(ends)
        for step in walk.steps:
            if step.deleted is None:
                place[b, step.column] = len(ends)
                depths.append(step.depth - 1)
                ends.append(-1)
            else:
                ends[place[b, step.deleted]] = len(ends)
        ends[begin:] = [len(ends) if end < 0 else end for end in ends[begin:]]
        if len(ends) > begin:
            groups.append((begin, len(ends)))
    device = x.ids.device
    at = torch.tensor(list(place), device=device)
    tree = TreeRow(torch.tensor(depths, device=device), torch.tensor(ends, device=device), groups)
    hidden = tree_hidden(model.trunk, x.ids[at[:, 0], at[:, 1]], tree)
    tops = torch.tensor([place[state.row, state.top] for state in wanted], device=device)
    return output_head(model)(hidden[tops])


def _by_branches(
    model: CausalLM | Seq2SeqLM, x: TokenBatch, walks: list[_Walk], prompts: list[int], wanted: list[_Wanted]
) -> Tensor:
    """(N, V) logits from rows of visible tokens, one for every state that no other one continues."""
    inner = {(state.row, below) for state in wanted for below in walks[state.row].path(state.top)[:-1]}
    leaves = dict.fromkeys((s.row, s.top) for s in wanted if (s.row, s.top) not in inner)
    ids, rows = x.ids.tolist(), []
    owner: dict[tuple[int, int], int] = {}
    for i, (b, top) in enumerate(leaves):
        path = walks[b].path(top)
        owner |= {(b, column): i for column in (-1, *path)}
        # A token more, so that what follows the whole prefix is predicted too; which one does not matter.
        rows.append([*(ids[b][column] for column in path), 0])
    logits = target_logits(model, TokenBatch.from_lists(rows, starts=[prompts[b] for b, _ in leaves]))
    which = torch.tensor([(owner[state.row, state.top], state.depth) for state in wanted], device=logits.device)
    return logits[which[:, 0], which[:, 1]]
