"""Random requests for a tiny engine, and what came back for them.

Everything follows from the seed: prompts, sampling parameters, the step at which a
request arrives and the one at which it is aborted. So two runs differ only in what
the engine does.
"""

import random
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams

VOCAB = 2048
STOP_TOKENS = range(4, 400)  # many, so that some requests do stop early


@dataclass
class Request:
    """One request of a workload."""

    name: str
    prompt: list[int]
    params: dict[str, Any]
    arrives: int  # step
    aborted: int | None = None  # step
    lora: bool = False


@dataclass
class Answer:
    """What a request got: comparable and writable as JSON."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[list[tuple[int, float, int | None]]] = field(default_factory=list)
    reason: str | None = None


def model_runner(llm: LLM) -> Any:
    """The model runner of an engine in this process."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def sampling(choose: random.Random) -> dict[str, Any]:
    """Parameters of one request, of every kind that changes what a step does."""
    params: dict[str, Any] = {"temperature": 0.0}
    if choose.random() < 0.6:
        params = {"temperature": choose.choice([0.5, 1.0, 1.3])}
        if choose.random() < 0.8:
            params["seed"] = choose.randrange(1000)
        if choose.random() < 0.3:
            params["top_k"] = choose.choice([1, 5, 50])
        if choose.random() < 0.3:
            params["top_p"] = choose.choice([0.5, 0.9])
        if choose.random() < 0.2:
            params["min_p"] = 0.05
    if choose.random() < 0.25:
        params["repetition_penalty"] = 1.2
    if choose.random() < 0.15:
        params |= {"presence_penalty": 0.5, "frequency_penalty": 0.3}
    if choose.random() < 0.3:
        params["logprobs"] = choose.choice([0, 1, 4])
    if choose.random() < 0.15:
        params["logit_bias"] = {choose.randrange(VOCAB): 8.0 for _ in range(2)}
    if choose.random() < 0.15:
        params["allowed_token_ids"] = choose.sample(range(4, VOCAB), 50)
    if choose.random() < 0.3:
        params["stop_token_ids"] = choose.sample(STOP_TOKENS, 60)
    params["max_tokens"] = choose.randint(1, 24)
    if choose.random() < 0.2:
        params["min_tokens"] = choose.randint(1, params["max_tokens"])
    return params


def requests(
    seed: int,
    count: int,
    *,
    shared_prefixes: bool = False,
    repetitive: bool = False,
    lora: bool = False,
    longest: int = 40,
    last_arrival: int = 30,
) -> list[Request]:
    """``count`` requests that join, finish and are aborted over some 50 steps.

    Args:
        shared_prefixes: Prompts start with one of two prefixes of 32 tokens.
        repetitive: Prompts repeat themselves, so that n-gram drafts are proposed.
        lora: A third of the requests asks for an adapter.
        longest: Tokens of the longest prompt.
    """
    choose = random.Random(seed)
    prefixes = [[choose.randrange(4, VOCAB) for _ in range(32)] for _ in range(2)]
    made = []
    for number in range(count):
        length = 1 if choose.random() < 0.15 else choose.randint(2, longest)
        prompt = [choose.randrange(4, VOCAB) for _ in range(length)]
        if repetitive:
            prompt = (prompt[:4] * longest)[:longest]
        if shared_prefixes:
            prompt = choose.choice(prefixes) + prompt[:8]
        arrives = choose.randint(0, last_arrival)
        request = Request(str(number), prompt, sampling(choose), arrives)
        if repetitive:  # drafts are proposed for, and checked against, greedy text
            request.params = {"temperature": 0.0, "max_tokens": 24}
        if choose.random() < 0.15:
            request.aborted = arrives + choose.randint(1, 12)
        request.lora = lora and choose.random() < 0.34
        made.append(request)
    return made


def run(
    llm: LLM, workload: list[Request], *, adapter: Any = None, between: Any = None
) -> dict[str, Answer]:
    """Answers by request name.

    Args:
        adapter: LoRA request for those who ask for one.
        between: Called with the number of each step before it.
    """
    engine = llm.llm_engine
    np.random.seed(0)  # where requests without a seed get theirs
    answers = {request.name: Answer() for request in workload}
    step = 0
    while step <= max(r.arrives for r in workload) or engine.has_unfinished_requests():
        for request in workload:
            if request.arrives == step:
                engine.add_request(
                    request.name,
                    {"prompt_token_ids": request.prompt},
                    SamplingParams(**request.params, detokenize=False),
                    lora_request=adapter if request.lora else None,
                )
            if request.aborted == step and answers[request.name].reason is None:
                engine.abort_request([request.name])
                answers[request.name].reason = "aborted"
        if between is not None:
            between(step)
        for output in engine.step():
            answer, completion = answers[output.request_id], output.outputs[0]
            answer.tokens = list(completion.token_ids)
            answer.logprobs = [
                [(token, value.logprob, value.rank) for token, value in row.items()]
                for row in completion.logprobs or []
            ]
            answer.reason = answer.reason or completion.finish_reason
        step += 1
        assert step < 1000, "the workload does not end"
    return answers


def findings(answers: dict[str, Answer]) -> dict[str, Any]:
    """The answers, and state, calls and steps aside per patch: ready for JSON."""
    from vllm_ext import plugin

    used = plugin.engine.outcomes if plugin.engine else {}
    return {
        "answers": {name: asdict(answer) for name, answer in answers.items()},
        "patches": {
            name: [outcome.state, sum(outcome.calls.values()), dict(outcome.aside)]
            for name, outcome in used.items()
        },
    }
