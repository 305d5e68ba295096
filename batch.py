"""Batches: episodes as tensors, packed without padding into passes that a network reads.
Legend: B episodes, T tokens, D width, N response tokens of a pass.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from episode import Episode
from model import Decoder, shift


class Batch(NamedTuple):
    """Right-padded tensors: one value per token."""
    ids: Tensor  # [B, T]
    response_mask: Tensor  # [B, T] bool, True on the tokens that the policy wrote

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.ids.to(device), self.response_mask.to(device))

    def lengths(self) -> list[int]:
        """Tokens of each row up to its last response token; later ones cannot matter."""
        positions = torch.arange(1, self.ids.shape[1] + 1, device=self.ids.device)
        return (self.response_mask * positions).amax(1).clamp(min=1).tolist()


class Packed(NamedTuple):
    """Rows one after another, without padding."""
    ids: Tensor  # [1, sum of documents]
    response_mask: Tensor  # [1, sum of documents] bool
    documents: list[int]  # tokens of each row


def collate(episodes: Sequence[Episode], *, pad_id: int, end_of_turn: int | None = None) -> Batch:
    """Episodes as a batch. The mask comes from the segments, never from ids != pad.

    end_of_turn: a token to append after an agent's last segment and to train on, because a student
    that never learns to stop writes to the limit.
    """
    rows = []
    for episode in episodes:
        ids, mask = episode.ids, episode.response_mask
        if episode.status == "search_error":  # nothing is learnt from the retriever's faults
            mask = [False] * len(ids)
        elif end_of_turn is not None and mask and mask[-1] and ids[-1] != end_of_turn:
            ids, mask = [*ids, end_of_turn], [*mask, True]
        rows.append((ids, mask))
    width = max((len(ids) for ids, _ in rows), default=1)
    ids = [ids + [pad_id] * (width - len(ids)) for ids, _ in rows]
    mask = [mask + [False] * (width - len(mask)) for _, mask in rows]
    return Batch(torch.tensor(ids, dtype=torch.long).view(-1, width),
                 torch.tensor(mask, dtype=torch.bool).view(-1, width))


def pack(batch: Batch, rows: Sequence[int], lengths: Sequence[int]) -> Packed:
    """These rows of a batch, up to their lengths (batch.lengths())."""
    if not rows:  # one masked dummy token, so that every rank still runs a forward pass
        return Packed(batch.ids.new_zeros(1, 1), batch.response_mask.new_zeros(1, 1), [1])
    ids, mask = (torch.cat([tensor[i, : lengths[i]] for i in rows])[None] for tensor in batch)
    return Packed(ids, mask, [lengths[i] for i in rows])


def response_rows(decoder: Decoder, packed: Packed) -> Tensor:
    """Hidden states that predict the response tokens, in their order: [N, D]."""
    hidden = decoder.hidden(packed.ids, documents=packed.documents)
    return shift(hidden, packed.documents)[packed.response_mask]
