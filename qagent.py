"""QAgent: a plug-and-play search agent (Jiang et al., 2025, arXiv:2510.08383).

The agent plans, asks several queries at once, reflects on what came back, and hands the passages to
any generator. It learns by GRPO in two stages (equations of the paper's Sec. 3):
    stage 1   R = 1[format] EM(answer)                  rewards the whole chain, end to end
    stage 2   R = EM(generator's answer) + 0.5 Hit      rewards the passages, as a frozen generator
                                                        uses them

Departures from the official code (commit f82eb19 of OpenStellarTeam/QAgent), with reasons. The
option at the right, where there is one, does as the official code does.
 1. Everything is read from the recorded episode. The official regular expressions run over the
    whole text, so they also match the notice after an invalid action.
 2. Hit looks at retrieved passages alone, for whole words. The paper and its code look at the
    whole trajectory, so an agent is paid for listing guesses in its plan, and inside words, so
    that "no" is found in "know".              --hit-in trajectory, --hit-rule substring
 3. Exact match is strict in both stages. The official stage 2 and evaluation accept a gold answer
    anywhere within the prediction, even inside a word ("no" in "know").      --answer-match within
 4. The generator reads each passage once, title and text, in the order in which they were found.
    The official one reads texts alone, in the order of a set.
 5. The instruction opens the user's message. The official one is the system's message.
 6. A turn that its length cuts off gets a notice and another turn. There it ends the episode.
 7. The notice has no tags. The official one has: after it every episode fails the format, and "and"
    is taken for an answer.
 8. Passages of a turn come in the order of the queries, then of their ranks, each once. There the
    order of the queries depends on which thread ends first.
 9. Numbers run through a block of passages. There they start at 1 for each query, so with one
    passage a query all are "#1".
10. The bound of three queries a turn is kept. There it is in the prompt alone.    --max-queries 0
11. A group's deviation gets 1e-6 added, as in Search-R1. There it is 1e-4.
As published: an episode that never searches has the right format; fewer passages earn nothing.

    torchrun train.py --phase qagent --stage 1                       learn; then --stage 2
    python qagent.py search "who wrote ..." --model runs/qagent      passages, and how it found them
    python qagent.py answer "who wrote ..." --generator DIR          a generator's answer from them
    python qagent.py serve --model runs/qagent --port 8018           HTTP, for this machine alone
    python qagent.py measure --model runs/qagent --generators DIR DIR    exact match of generators
                    with its passages; --passages naive (top 5 of one search), gold or none

Legend: K passages collected.
"""

import json
import re
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import eval as evaluation
from bard import check_own_reward, open_own_guide
from data import Passage, Question, build_messages, f1, hit, normalize_answer
from episode import (
    Episode,
    Protocol,
    episode_text,
    outside_thoughts,
    parse_action,
    unique_passages,
)
from eval import QUESTION_FILES, AgentSettings
from formats.answers import contains
from infra import cli
from infra.config import setting
from infra.parallel import pick_device
from infra.programs import check_paths, read_command
from infra.record import model_name, recorded_settings
from infra.run import Run, launch
from reinforce import reinforce
from retriever import Retriever
from rollout import Policy, RolloutSettings, generate, load_protocol
from serving.ask import RECORDED
from session import Task, load_policy, open_session, open_student
from settings import TrainSettings
from settings import with_defaults as with_core_defaults
from tokenizer import Tokenizer

PHASES = {"qagent": "learn reinforce teacher"}  # with words for `of` in infra/config.py
# QAgent's loop in our own words. Its published text (its paper's Table 5) belongs in a file, for
# its checkpoints.
QAGENT_PROMPT = (
    "Find what is needed to answer the question below. Work in turns. To search, first write "
    "what you still have to find out and how inside <plan> and </plan>, then up to three "
    "queries, each inside <query> and </query>, all of them inside <search> and </search>. "
    "What is found comes back between <information> and </information>; say inside "
    "<reflection> and </reflection> what it tells you and what is missing, then plan and "
    "search again, or give the answer, a few words, inside <answer> and </answer>. Question: "
    "{question}"
)
GENERATOR_PROMPT = (
    "{passages}\n\nUse the passages above to answer the question. Answer in a few words, without "
    "an explanation.\nQuestion: {question}"
)
QUERY = re.compile(r"<query>(.*?)</query>", re.DOTALL)
PLANNED = re.compile(r"<plan>((?!</?plan>).)*</plan>\s*$", re.DOTALL)
REFLECTED = re.compile(r"\s*<reflection>((?!</?reflection>).)*</reflection>", re.DOTALL)
INFORMATION_END = "</information>\n"
REMOTE_CALLS = 8  # requests to a remote generator at once
NAIVE_PASSAGES = 5  # of the one search of naive RAG (the paper's baselines)

Generator = Callable[[Sequence[Question], Sequence[Sequence[Passage]]], list[str]]


# ---- the protocol ----


def query_list(content: str) -> tuple[str, ...]:
    """The texts in <query> tags; without any tag, one query a line (official code)."""
    queries = QUERY.findall(content) or content.split("\n")
    return tuple(query.strip() for query in queries if query.strip())


def passage_block(passages: Sequence[Passage]) -> str:
    blocks = [f"Passage #{i} {p.name}\nPassage #{i} {p.text}\n\n"
              for i, p in enumerate(passages, 1)]
    return f"\n<information>\n{''.join(blocks)}{INFORMATION_END}"


# The agent writes <plan>, then <search> with a <query> for each of several queries, or <answer>. A
# block of numbered passages comes back, and the agent begins its next turn with a <reflection>.
QAGENT = Protocol(
    name="qagent",
    queries=query_list,
    observation=passage_block,
    observation_end=INFORMATION_END,
    notice="\nNo action was found in this turn. Plan, then put each query between query tags, all "
    "of them between the search tags; or put the final answer between the answer tags.\n",
    max_queries=3,
)


# ---- settings ----


@dataclass
class GeneratorSettings:
    """What a preset's table [qagent] may hold beside protocol and prompt: all commands read it."""

    protocol: str = setting("qagent", "what the agent may write",
                            reads="qagent|search-r1|FILE.py:NAME")
    prompt: str = setting("qagent", "qagent: our words; FILE with {question}: the published text",
                          reads="qagent|paper|short|row|FILE")
    max_queries: int = setting(3, "queries of one search; 0: any number", rare=True)
    generator: str = setting("", "reads passages, answers; or http://.../v1/chat/completions",
                             reads="URL|DIR")
    generator_model: str = setting("", "the model's name, for a generator behind http")
    generator_prompt: str = setting("", "a file with {passages} and {question}; empty: our words",
                                    reads="FILE", rare=True)
    generator_tokens: int = setting(64, "tokens of a generator's answer", at_least=1)
    generator_timeout_s: float = setting(60.0, "a generator behind http that takes longer is asked "
                                         "again", above=0, rare=True)
    generator_tries: int = setting(3, "times that a generator behind http is asked", at_least=1,
                                   rare=True)
    hit_rule: str = setting("words", "a gold answer counts as found as whole words, or (published) "
                            "also inside a word", choices=("words", "substring"))


@dataclass
class QAgentSettings(GeneratorSettings, TrainSettings):
    phase: str = setting("qagent", "what to run", choices=PHASES)
    stage: int = setting(1, "1: format and answer; 2: what a generator makes of the passages",
                         at_least=1, at_most=2)
    answer_match: str = setting("strict", "a generator's answer equals a gold one, or has it "
                                "within", choices=("strict", "within"), when="stage 2")
    hit_in: str = setting("passages", "where a gold answer counts as found (published: "
                          "trajectory)", choices=("passages", "trajectory"), when="stage 2")
    hit_weight: float = setting(0.5, "what a hit is worth in stage 2", when="stage 2")


def agent_protocol(settings: GeneratorSettings) -> Protocol:
    """The protocol that settings name, QAgent's with its bound on queries."""
    if settings.protocol in ("qagent", "qagent.py:QAGENT"):
        return QAGENT._replace(max_queries=settings.max_queries)
    return load_protocol(settings.protocol)


def with_defaults(settings: QAgentSettings) -> QAgentSettings:
    """Settings with what the phase implies where they are left open; refuses what cannot work."""
    if settings.stage not in (1, 2):
        raise ValueError(f"--stage {settings.stage}: expected 1 or 2")
    settings = replace(settings, advantage=settings.advantage or "group")
    check_own_reward(settings, QAGENT.name, agent_protocol(settings).name)
    return with_core_defaults(settings, reinforces=True)


# ---- the agent ----


def as_asked(questions: Sequence[Question], settings: RolloutSettings) -> list[Question]:
    """The questions with QAGENT_PROMPT as their own prompt, if settings ask for it."""
    if settings.prompt != "qagent":
        return list(questions)
    asked = []
    for question in questions:
        # The instruction is appended to a row's prompt later.
        [message] = build_messages(replace(question, instruction=""), "short")
        content = QAGENT_PROMPT.replace("{question}", message["content"])
        asked.append(replace(question, prompt=[{"role": "user", "content": content}]))
    return asked


def core_settings(settings: RolloutSettings) -> RolloutSettings:
    """The settings with names that the core knows: it has prompts of rows, and not ours."""
    return replace(settings, prompt="row") if settings.prompt == "qagent" else settings


def play_agent(
    policy: Policy, retriever: Retriever, questions: Sequence[Question],
    settings: "SearchSettings", *, seed: int, progress: str = "",
) -> list[Episode]:
    """An episode of the agent for each question."""
    return generate(
        policy, retriever, as_asked(questions, settings), core_settings(settings), seed=seed,
        progress=progress, protocol=agent_protocol(settings))


# ---- rewards ----


def collected_passages(episode: Episode) -> list[Passage]:
    """K: the passages of all turns, each once, in the order in which they were found."""
    return unique_passages(episode.passages)


def follows_format(episode: Episode, tokenizer: Tokenizer) -> bool:
    """r_fmt: whether the episode ends with an answer, and every turn has its parts.

    Each search stands directly after a closed plan, and each turn after a block of passages begins
    with a reflection. A turn without an action breaks the format.
    """
    turns = [tokenizer.decode(s.ids) for s in episode.segments if s.author == "agent"]
    if episode.status != "answered" or len(turns) != episode.num_searches + 1:
        return False
    reflects = all(REFLECTED.match(turn) for turn in turns[1:])
    turns = [outside_thoughts(turn) for turn in turns]
    return reflects and all(PLANNED.search(turn.partition("<search>")[0]) for turn in turns[:-1])


def within(prediction: str | None, golds: Sequence[str], rule: str = "squad") -> float:
    """The published "non-strict" match: a normalised gold answer within the prediction."""
    normalize = partial(normalize_answer, rule=rule)
    return float(contains([prediction or ""], golds, normalize, whole_words=False))


def has_hit(episode: Episode, tokenizer: Tokenizer, hit_in: str, hit_rule: str = "words") -> bool:
    """Whether a gold answer is in a passage, or (hit_in "trajectory") anywhere after the prompt."""
    question, passages = episode.question, collected_passages(episode)
    if hit_in == "trajectory":
        texts = [tokenizer.decode(s.ids) for s in episode.segments if s.author != "prompt"]
        passages = [Passage("", "", " ".join(texts), 0.0)]
    return hit(passages, question.golden_answers, question.answer_rule,
               whole_words=hit_rule == "words")


def rewards(
    episodes: Sequence[Episode], tokenizer: Tokenizer, generator: Generator | None,
    settings: QAgentSettings,
) -> list[float]:
    """What episodes are worth in a stage (see the header); generator: needed in stage 2."""
    if settings.stage == 1:
        return [follows_format(episode, tokenizer) * episode.score for episode in episodes]
    questions = [episode.question for episode in episodes]
    answers = generator(questions, [collected_passages(episode) for episode in episodes])
    values = []
    for answer, episode in zip(answers, episodes, strict=True):
        question = episode.question
        match = question.match
        if settings.answer_match == "within":
            match = partial(within, rule=question.answer_rule)
        correct = match(answer, question.golden_answers)
        is_hit = has_hit(episode, tokenizer, settings.hit_in, settings.hit_rule)
        values.append(correct + settings.hit_weight * is_hit)
    return values


def report_passages(
    episodes: Sequence[Episode], tokenizer: Tokenizer, hit_rule: str = "words"
) -> dict[str, float]:
    """Sums over the episodes of a step: passages, hits, queries and formats."""
    return {
        "passages": sum(len(collected_passages(episode)) for episode in episodes),
        "hit": sum(has_hit(episode, tokenizer, "passages", hit_rule) for episode in episodes),
        "queries": sum(len(episode.queries) for episode in episodes),
        "dropped_queries": sum(episode.dropped_queries for episode in episodes),
        "format": sum(follows_format(episode, tokenizer) for episode in episodes),
    }


# ---- the frozen generator ----


def generator_messages(
    question: Question, passages: Sequence[Passage], prompt: str = ""
) -> list[dict[str, str]]:
    """The chat that a generator answers; prompt: a file with {passages} and {question}."""
    template = Path(prompt).read_text(encoding="utf-8") if prompt else GENERATOR_PROMPT
    if "{question}" not in template or "{passages}" not in template:
        raise ValueError(f"--generator-prompt {prompt}: got no {{question}} or no {{passages}}, "
                         "expected both")
    texts = [f"{passage.name}\n{passage.text}" for passage in passages]
    values = {"{passages}": "\n\n".join(texts) or "(no passages)",
              "{question}": question.question}
    # Split first: a text that is put in may hold a place's name itself.
    parts = re.split(r"(\{passages\}|\{question\})", template)
    return [{"role": "user", "content": "".join(values.get(part, part) for part in parts)}]


def local_generator(policy: Policy, settings: GeneratorSettings) -> Generator:
    """A checkpoint that answers greedily; the last passages that do not fit are left out."""

    def fit(question: Question, passages: Sequence[Passage]) -> Question:
        room = settings.max_context_tokens - settings.generator_tokens
        for count in range(len(passages), -1, -1):
            messages = generator_messages(question, passages[:count], settings.generator_prompt)
            if count == 0 or len(policy.tokenizer.chat(messages)) < room:
                # No instruction: it is meant for the agent.
                return replace(question, prompt=messages, instruction="")

    def ask(questions: Sequence[Question], passages: Sequence[Sequence[Passage]]) -> list[str]:
        rules = replace(settings, protocol="search-r1", prompt="row", max_turns=0,
                        temperature=0.0, max_new_tokens=settings.generator_tokens)
        asked = [fit(q, some) for q, some in zip(questions, passages, strict=True)]
        answers = []
        for episode in generate(policy, None, asked, rules, seed=0):
            last = episode.segments[-1]  # the prompt, if that alone fills the context
            text = policy.tokenizer.decode(last.ids) if last.author == "agent" else ""
            answers.append(final_answer(text))
        return answers

    return ask


def final_answer(text: str) -> str:
    """A generator's answer without thinking and tags; empty if it was cut off while it thought."""
    if "<think>" in text and "</think>" not in text:
        return ""
    text = text.rpartition("</think>")[2]
    action = parse_action(text)
    return action.content if action.kind == "answer" else text.strip()


def remote_generator(settings: GeneratorSettings) -> Generator:
    """A chat-completions server; ConnectionError once it has failed generator_tries times."""

    def ask(question: Question, passages: Sequence[Passage]) -> str:
        messages = generator_messages(question, passages, settings.generator_prompt)
        body = {"model": settings.generator_model, "temperature": 0,
                "max_tokens": settings.generator_tokens, "messages": messages}
        request = urllib.request.Request(
            settings.generator, json.dumps(body).encode(), {"Content-Type": "application/json"})
        for attempt in range(settings.generator_tries):
            if attempt > 0:
                time.sleep(min(10.0, 0.5 * 2 ** (attempt - 1)))
            try:
                with urllib.request.urlopen(request, timeout=settings.generator_timeout_s) as reply:
                    answer = json.load(reply)["choices"][0]["message"]["content"]
                return final_answer("" if answer is None else answer)  # null: cut off in thought
            except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                problem = f"{type(error).__name__}: {error}"
        raise ConnectionError(f"--generator {settings.generator}: got {problem} "
                              f"{settings.generator_tries} times, expected an answer of a "
                              "chat-completions server; see its log, then --resume")

    def ask_all(questions: Sequence[Question], passages: Sequence[Sequence[Passage]]) -> list[str]:
        with ThreadPoolExecutor(REMOTE_CALLS) as pool:
            return list(pool.map(ask, questions, passages))

    return ask_all


def load_generator(
    settings: GeneratorSettings, device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Generator:
    """The generator that --generator names: a checkpoint, or a server."""
    if not settings.generator:
        raise ValueError("--generator: got none, expected a checkpoint or the address of a "
                         "chat-completions server")
    if is_remote(settings.generator):
        return remote_generator(settings)
    policy = load_policy(settings.generator, device, "generator", dtype)
    policy.decoder.requires_grad_(False)
    return local_generator(policy, settings)


def is_remote(generator: str) -> bool:
    return generator.startswith(("http://", "https://"))


# ---- the phase ----


def train(argv: list[str]) -> None:
    """Run phase qagent; train.py hands over to it."""
    settings = cli.load(
        QAgentSettings, argv, prog="qagent.py", description=__doc__.split("\n")[0],
        default_config=evaluation.DEFAULT_CONFIG, finish=with_defaults)
    launch(settings, partial(run_phase, settings=settings))


def run_phase(run: Run, settings: QAgentSettings) -> None:
    """GRPO on what the passages are worth, or PPO with --advantage gae."""
    rules = core_settings(settings)
    session = open_session(rules, run.device, Task(protocol=agent_protocol(settings)))
    for question in session.questions:
        evaluation.check_answer_kind(question)
    student = open_student(run, rules)
    guide, generator = open_own_guide(settings, run.device, student), None
    if settings.stage == 2:
        generator = load_generator(settings, run.device, getattr(torch, settings.teacher_dtype))
    task = Task(
        reward=lambda episodes: rewards(episodes, student.tokenizer, generator, settings),
        report=lambda episodes: report_passages(episodes, student.tokenizer, settings.hit_rule),
        prepare=lambda questions, *seeds: as_asked(questions, settings), drop_equal_groups=True)
    reinforce(run, rules, student, guide, session, task)


# ---- plug and play ----


@dataclass
class SearchSettings(GeneratorSettings, AgentSettings):
    max_turns: int = setting(5, "turns that may search (official code)")
    top_k: int = setting(1, "passages of a query (official code)")
    model: str = setting("runs/qagent", "checkpoint that searches", reads="DIR")
    passages: str = setting("agent", "measure: whose passages; naive: 5 of one search for the "
                            "question; gold: those that the row names",
                            choices=("agent", "naive", "none", "gold"))
    generators: tuple[str, ...] = setting((), "measure: several generators; empty: --generator",
                                          reads="URL|DIR")
    questions: tuple[str, ...] = setting(QUESTION_FILES, "measure: question files, JSONL",
                                         reads="FILE")
    limit: int | None = setting(None, "measure: only the first questions of each file", at_least=1)
    name: str = setting("", "measure: its name in tables; empty: the last part of model")
    out: str = setting("", "measure: folder to write; empty: runs/eval/<name>", writes="DIR")
    question: str = setting("", "search, answer: what is asked, with or without the flag",
                            is_words=True)
    host: str = setting("127.0.0.1", "serve: address; 0.0.0.0 opens the door to other machines, "
                        "without a password")
    port: int = setting(8018, "serve: port", at_least=1, at_most=65535)


# What the commands take from a training preset: not how training samples, or what it trains on.
SHARED = {field.name for field in fields(SearchSettings)} - {"temperature", "questions", "seed"}


class SearchResult(NamedTuple):
    passages: list[Passage]
    queries: list[str]
    trace: str  # the episode as text


def search(
    question: str, policy: Policy, retriever: Retriever, settings: SearchSettings, *, seed: int = 0
) -> SearchResult:
    """The agent's passages and how it found them; ConnectionError if the retriever fails."""
    if not question.strip():
        raise ValueError("question: got nothing, expected a text")
    asked = Question("asked", question, (), "asked")
    [episode] = play_agent(policy, retriever, [asked], settings, seed=seed)
    if episode.status == "search_error":
        raise ConnectionError("the retriever failed, see above why")
    return search_result(episode, policy.tokenizer)


def search_result(episode: Episode, tokenizer: Tokenizer) -> SearchResult:
    trace = episode_text(episode, tokenizer)
    return SearchResult(collected_passages(episode), episode.queries, trace)


def serve(policy: Policy, retriever: Retriever, settings: SearchSettings, port: int) -> tuple:
    """(the engine that answers, a server that listens): server.py's routes, and one more.

    POST /search {"question": text} -> {"passages": [...], "queries": [...], "trace": text}. A
    passage is {id, title, text}. An error is {"error": text}.
    """
    from server import open_server, read_ask  # here, because only this command needs them
    from serving.engine import SharedEngine, answer

    def look_up(body: Any) -> Any:
        return answer(engine, read_ask(body)[0], reply)

    def reply(job: Any) -> dict[str, Any]:
        result = search_result(job.episode, policy.tokenizer)
        passages = [{"id": p.id, "title": p.name, "text": p.text} for p in result.passages]
        return {"passages": passages, "queries": result.queries, "trace": result.trace}

    engine = SharedEngine(
        policy, retriever, core_settings(settings), seed=settings.seed,
        protocol=agent_protocol(settings), prepare=lambda asked: as_asked([asked], settings)[0])
    return engine, open_server(engine, model_name(settings.model), settings.host, port,
                               routes={("POST", "/search"): look_up})


# ---- how good the passages are for generators ----


def gather_passages(
    policy: Policy | None, retriever: Retriever | None, questions: Sequence[Question],
    settings: SearchSettings, *, seed: int, progress: str = "",
) -> tuple[list[list[Passage]], list[dict[str, float]]]:
    """The passages for each question, as settings.passages says, and what it took to find them."""
    if settings.passages == "none":
        return [[] for _ in questions], [{} for _ in questions]
    if settings.passages == "gold":
        return evaluation.gold_passages(questions, retriever), [{} for _ in questions]
    if settings.passages == "naive":
        results = retriever.search([q.question for q in questions], NAIVE_PASSAGES)
        return results, [{"queries": 1.0} for _ in questions]
    episodes = play_agent(policy, retriever, questions, settings, seed=seed, progress=progress)
    measures = [{"queries": float(len(episode.queries)), "searches": float(episode.num_searches),
                 "agent_em": episode.score,
                 "agent_f1": f1(episode.answer, episode.question.golden_answers,
                                episode.question.answer_rule)}
                for episode in episodes]
    return [collected_passages(episode) for episode in episodes], measures


def evaluate_passages(
    policy: Policy | None, retriever: Retriever | None,
    question_sets: dict[str, list[Question]], generators: dict[str, Generator],
    settings: SearchSettings, *, progress: bool = False,
) -> dict[str, Any]:
    """Measure what generators make of the passages.

    Returns {"sets": {set: means}, "average": over the sets, "rows": one for each question}. For
    each generator there are strict exact match "em NAME", the published one "within NAME" and
    "f1 NAME". Beside them stand hit, passages, queries, searches, and the agent's own answers.
    """
    sets, all_rows = {}, []
    for name, questions in question_sets.items():
        collections, measures = gather_passages(
            policy, retriever, questions, settings, progress=name if progress else "",
            seed=evaluation.set_seed(settings.seed, name))
        rows = []
        for question, passages, measured in zip(questions, collections, measures, strict=True):
            found = hit(passages, question.golden_answers, question.answer_rule,
                        whole_words=settings.hit_rule == "words")
            rows.append({"set": name, "id": question.id, "passages": float(len(passages)),
                         "hit": float(found), **measured})
        for label, generator in generators.items():
            answers = generator(questions, collections)
            for row, answer, question in zip(rows, answers, questions, strict=True):
                golds, rule = question.golden_answers, question.answer_rule
                row.update({f"answer {label}": answer, f"em {label}": question.match(answer, golds),
                            f"within {label}": within(answer, golds, rule),
                            f"f1 {label}": f1(answer, golds, rule)})
        keys = [key for key, value in rows[0].items() if isinstance(value, float)]
        sets[name] = {key: float(np.mean([row[key] for row in rows])) for key in keys}
        all_rows += rows
    average = {}
    for key in next(iter(sets.values())):
        average[key] = float(np.mean([means[key] for means in sets.values()]))
    return {"sets": sets, "average": average, "rows": all_rows}


def passages_table(result: dict[str, Any]) -> str:
    """A line for each measure, a column for each set."""
    columns = {**result["sets"], "average": result["average"]}
    lines = [[result["name"], *columns]]
    for key in result["average"]:
        lines.append([key, *(f"{means[key]:.3f}" for means in columns.values())])
    return evaluation.align(lines)


def run_measure(
    settings: SearchSettings, policy: Policy | None, retriever: Retriever | None
) -> None:
    """Measure, write DIR/submodule.json and .jsonl, print the table."""
    measured = settings.model if settings.passages == "agent" else settings.passages
    name, out = evaluation.name_and_out(settings, measured)
    specs = settings.generators or (settings.generator,)
    labels = [spec if is_remote(spec) else Path(spec).name for spec in specs]
    if len(set(labels)) < len(labels):
        raise ValueError(f"--generators: got {labels}, expected names that differ")
    sets = evaluation.read_sets(
        settings.questions, settings.limit, answer_rule=settings.answer_rule)
    dtype, device = getattr(torch, settings.dtype), pick_device(settings.device)
    generators = {label: load_generator(replace(settings, generator=spec), device, dtype)
                  for label, spec in zip(labels, specs, strict=True)}
    result = {"name": name}
    result |= evaluate_passages(policy, retriever, sets, generators, settings, progress=True)
    rows = result.pop("rows")
    evaluation.write_result(
        out / "submodule.json", {**result, "settings": asdict(settings)}, rows)
    print(f"{passages_table(result)}\n\nwrote {out}/submodule.json, .jsonl")


# ---- the program ----


def check_files(command: str, settings: SearchSettings) -> None:
    """Refuse a question too few or too many, and files that are not there."""
    if (command in ("search", "answer")) != bool(settings.question):
        raise ValueError(f'{command}: got question {settings.question!r}, expected '
                         + ("none" if settings.question else 'one: "who wrote ..."'))
    asks_agent = command != "measure" or settings.passages == "agent"
    check_paths(replace(settings, model=settings.model if asks_agent else "",
                        questions=settings.questions if command == "measure" else ()))


def main(argv: list[str]) -> None:
    commands = ("search", "answer", "serve", "measure")
    command = read_command(argv, "qagent.py", __doc__, commands)
    settings = cli.load(
        SearchSettings, argv[1:], prog=f"qagent.py {command}", shared=SHARED,
        recorded=partial(recorded_settings, sorted(RECORDED | {"max_queries"})),
        description="A plug-and-play search agent.", default_config=evaluation.DEFAULT_CONFIG)
    check_files(command, settings)
    if "://" not in settings.index and not (settings.corpus and settings.encoder):
        raise ValueError(f"got corpus {settings.corpus!r} and encoder {settings.encoder!r}, "
                         "expected both; give --corpus and --encoder")
    generator = policy = retriever = None
    if command == "answer":
        device = pick_device(settings.device)
        generator = load_generator(settings, device, getattr(torch, settings.dtype))
    if command != "measure" or settings.passages == "agent":
        policy, retriever = evaluation.load_agent(settings)
    elif settings.passages != "none":
        retriever = evaluation.load_retriever(settings)
    if command == "measure":
        return run_measure(settings, policy, retriever)
    if command == "serve":
        from server import run_server

        return run_server(*serve(policy, retriever, settings, settings.port), "/search")
    question = settings.question
    result = search(question, policy, retriever, settings)
    print(result.trace)
    for number, passage in enumerate(result.passages, 1):
        print(f"\n[{number}] {passage.name}\n{passage.text}")
    if generator is not None:
        asked = Question("asked", question, (), "asked")
        [answer] = generator([asked], [result.passages])
        print(f"\nanswer: {answer}")


if __name__ == "__main__":
    with cli.reporting("qagent.py", RuntimeError):
        main(sys.argv[1:])
