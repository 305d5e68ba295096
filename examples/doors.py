"""The doors, from any folder: load, retrieve, ask, score a batch, a loss of your own.

    python PROJECT/examples/doors.py

examples/doors.ipynb has the same cells as a notebook.
"""
# ruff: noqa: E402, I001  (the path comes before what is imported from it)

# %% [markdown]
# The project is not installed. Its folder goes in front of the path; relative paths are yours.

# %%
import os
import sys
from pathlib import Path

HERE = Path(globals().get("__file__", "doors.ipynb")).resolve()  # a notebook has no __file__
PROJECT = Path(os.environ.get("DGPO", HERE.parent.parent))  # or write your path here
sys.path.insert(0, str(PROJECT))

# %% [markdown]
# Load a model and an index. Here they are the embedded world's; any published checkpoint does.

# %%
import torch

from data import Question
from retriever import Retriever
from rollout import RolloutSettings, generate
from session import load_policy

student = load_policy(str(PROJECT / "world" / "student"), torch.device("cpu"), "model")
teacher = load_policy(str(PROJECT / "world" / "teacher"), torch.device("cpu"), "model")
retriever = Retriever.load(PROJECT / "world" / "corpus.jsonl", PROJECT / "world" / "encoder")

# %% [markdown]
# Retrieve: the best passages of each query.

# %%
for passages in retriever.search(["novel Paper Lake", "film Paper Lake"], top_k=2):
    print([(passage.name, round(passage.score, 3)) for passage in passages])

# %% [markdown]
# Ask: an episode for each question, all of them at once.

# %%
from episode import episode_text

questions = [Question("a", "who is the author of the novel Paper Lake", ("Tessa Voss",), "mine"),
             Question("b", "who is the director of the film Salt House", ("Tessa Wexler",), "mine")]
settings = RolloutSettings(prompt="short", max_turns=2, top_k=1, max_new_tokens=64,
                           max_obs_tokens=80, max_context_tokens=512, temperature=0.0)
episodes = generate(teacher, retriever, questions, settings, seed=0)
print(episode_text(episodes[0], teacher.tokenizer))
print([(episode.answer, episode.score) for episode in episodes])

# %% [markdown]
# Score the batch: what the student thinks of each token that the teacher wrote.

# %%
from batch import collate, pack, response_rows
from kernels import head_logprobs

batch = collate(episodes, pad_id=student.tokenizer.pad_id)  # ids, response_mask [B, T]
packed = pack(batch, range(len(episodes)), batch.lengths())
targets = packed.ids[packed.response_mask]  # [N]: the tokens that the agent wrote
with torch.no_grad():
    hidden = response_rows(student.decoder, packed)  # [N, D]
    logprobs, entropy = head_logprobs(hidden, student.head, targets)  # [N] each
print(f"{len(targets)} tokens, mean log p {logprobs.mean():.3f}, entropy {entropy.mean():.3f}")

# %% [markdown]
# A loss of your own: it gets logits of both models for some rows and returns one number a row. Here
# it is the total variation between student and teacher. Gradients flow to the student.

# %%
from kernels import head_divergence


def total_variation(student_logits, teacher_logits, targets):
    """loss [n], and a number to report [n], of logits [n, V]."""
    gap = (student_logits.softmax(-1) - teacher_logits.softmax(-1)).abs().sum(-1) / 2
    return gap, gap.detach()


optimizer = torch.optim.Adam(student.decoder.parameters(), lr=1e-3)
for step in range(3):
    hidden = response_rows(student.decoder, packed)
    with torch.no_grad():
        teacher_hidden = response_rows(teacher.decoder, packed)
    loss, _ = head_divergence(total_variation, hidden, student.head, teacher_hidden, teacher.head,
                              targets)
    optimizer.zero_grad()
    (loss / len(targets)).backward()
    optimizer.step()
    print(f"step {step}: {loss.item() / len(targets):.4f}")
