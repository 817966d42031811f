"""Generation over two workers against the same model in one process, and what faults and distance cost.

    python benchmarks/generate.py [--part speed faults injected distance] [--rounds 3]

The model is a Llama, hidden 512, 8 layers, vocabulary 2000, fp32, random weights; two workers of one
thread hold 4 layers each, the local contestant (transformers.generate) has one thread. *speed*: tokens a
second for one sequence, alternating, and for 8 sessions at once. *faults*: the longest gap between
two tokens when a worker is killed, or frozen, at token 64, with a warm spare. *injected*: the rate over
1024 tokens if after each one a stage's worker is killed with a probability of 1 in 100, of the rate if none
is; there are warm spares for all. *distance*: plain decoding
against guessing, alternating, on workers beside the driver and 50 ms one way from it and from each other (a
relay before each worker holds all bytes back). On two texts: one that repeats its prompt of 128 tokens with
one in twenty changed, said by a small Llama that is trained here, within minutes, to do just that on random
tokens; and random tokens, which the same model says at temperature 10. Answers must be the same.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import write_results
from distributed import Client, LocalCluster
from relay import Relay

import dagflow
from dagflow.swarm.clusters import scheduler_info

TOKENS = 128
PROMPT_TOKENS = 32
VOCABULARY = 2000
DELAY_SECONDS = 0.05
LETTERS = 64
MANY_TOKENS = 1024
FAILURE = 0.01


def local_model() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def random_prompt(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (PROMPT_TOKENS,), generator=generator).tolist()


def locally(model: Any, prompt: Sequence[int]) -> tuple[list[int], float]:
    begin = time.perf_counter()
    with torch.inference_mode():
        found = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return found[0, len(prompt) :].tolist(), TOKENS / (time.perf_counter() - begin)


def over_workers(
    deployment: dagflow.Deployment, prompts: Sequence[Sequence[int]], **options: Any
) -> tuple[list[list[int]], float]:
    begin = time.perf_counter()
    found = dagflow.generate(deployment, prompts, max_new_tokens=TOKENS, ignore_end=True, **options)
    seconds = time.perf_counter() - begin
    answers = [tokens.tolist() for tokens in found.tokens]
    return answers, sum(map(len, answers)) / seconds


def measure_speed(model: dagflow.Model, local: Any, rounds: int) -> dict[str, Any]:
    cluster = dagflow.ClusterSettings(num_workers=2, num_torch_threads=1)
    ratios, alone, at_home, together = [], [], [], []
    with dagflow.Deployment(model, cluster=cluster) as deployment:
        for number in range(rounds + 1):
            prompt = random_prompt(number)
            wanted, theirs = locally(local, prompt)
            (found,), ours = over_workers(deployment, [prompt], speculate=False)
            assert found == wanted, "other tokens than transformers"
            eight, rate = over_workers(
                deployment, [random_prompt(8 * number + n) for n in range(8)], speculate=False
            )
            assert len(eight) == 8
            if number:  # the first round warms up
                ratios.append(ours / theirs)
                alone.append(ours)
                at_home.append(theirs)
                together.append(rate)
    return {
        "local_tokens_per_second": median(at_home),
        "tokens_per_second": median(alone),
        "of_local": median(ratios),
        "eight_sessions_tokens_per_second": median(together),
        "eight_of_one": median(t / a for t, a in zip(together, alone, strict=True)),
    }


@contextlib.contextmanager
def volunteers(count: int, folder: Path, delay: bool = False) -> Iterator[tuple[Client, list[int]]]:
    """Yield a client of a swarm of real processes, and their process ids by name."""
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0"))
        client = stack.enter_context(Client(cluster, set_as_default=False))
        processes = []
        for number in range(count):
            command = [sys.executable, "-m", "dask", "worker", cluster.scheduler_address]
            command += ["--name", f"volunteer-{number}", "--nthreads", "1", "--no-nanny"]
            command += ["--no-dashboard"]
            if delay:
                relay = stack.enter_context(Relay(DELAY_SECONDS))
                command += ["--listen-address", f"tcp://127.0.0.1:{relay.behind}"]
                command += ["--contact-address", f"tcp://127.0.0.1:{relay.port}"]
            else:
                command += ["--host", "127.0.0.1"]
            command += ["--preload", "dagflow.worker", "--torch-threads", "1"]
            log = stack.enter_context((folder / f"volunteer-{number}.log").open("w"))
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, stderr=log, stdout=log, env=environment)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process.pid)
        client.wait_for_workers(count, timeout=60)
        yield client, processes


def streamed(
    deployment: dagflow.Deployment,
    prompt: Sequence[int],
    num_tokens: int,
    faults: Mapping[int, int],
    pids: Mapping[str, int],
    how: signal.Signals,
) -> tuple[list[int | None], list[float]]:
    """Return an answer's tokens and when they came; after so many tokens a stage's worker gets a signal."""
    tokens, times = [], []
    for token in dagflow.generate(
        deployment,
        [prompt],
        max_new_tokens=num_tokens,
        ignore_end=True,
        speculate=False,
        stream=True,
    ):
        times.append(time.perf_counter())
        tokens.append(token.token)
        if len(tokens) in faults:
            address = deployment.engine.placement.addresses[faults[len(tokens)]]
            if address:  # else it is being replaced already
                os.kill(pids[address], how)
    return tokens, times


def measure_faults(model: dagflow.Model, local: Any) -> dict[str, Any]:
    """Return the gaps in an answer when a worker is killed, and when one is frozen."""
    prompt = random_prompt(0)
    wanted, _ = locally(local, prompt)
    return {
        "killed": measure_fault(model, wanted, prompt, signal.SIGKILL),
        "frozen": measure_fault(model, wanted, prompt, signal.SIGSTOP),
    }


def measure_fault(
    model: dagflow.Model, wanted: Sequence[int], prompt: Sequence[int], how: signal.Signals
) -> dict[str, Any]:
    """Kill or freeze each stage's worker in turn, at token 64; one spare is warm."""
    gaps, usual = [], []
    for stage in range(2):
        with tempfile.TemporaryDirectory() as folder, volunteers(3, Path(folder)) as (client, _):
            pids = client.run(os.getpid)
            with dagflow.Deployment(model, client, num_stages=2) as deployment:
                over_workers(deployment, [prompt], speculate=False)
                tokens, times = streamed(deployment, prompt, TOKENS, {64: stage}, pids, how)
                assert tokens == list(wanted), "other tokens than undisturbed"
                between = [b - a for a, b in itertools.pairwise(times)]
                gaps.append(max(between))
                usual.append(median(between))
    return {"longest_gap_seconds": max(gaps), "gaps_seconds": gaps, "usual_seconds": median(usual)}


def marked(count: int, generator: torch.Generator, rows: int = 1) -> tuple[Any, Any]:
    """Return random letters (rows, count), one in twenty of them marked, and the same with none."""
    plain = torch.randint(0, LETTERS, (rows, count), generator=generator)
    marks = torch.rand(rows, count, generator=generator) < 0.05
    return torch.where(marks, plain + LETTERS, plain), plain


def editing_model(num_steps: int = 2700) -> Any:
    """Train a Llama to say a text of 128 letters again, without its marks; first on shorter ones."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2 * LETTERS,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0)
    generator = torch.Generator().manual_seed(1)
    for step in range(num_steps):
        done = step / num_steps
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 30) * (1 - done) ** 0.5
        least, most = (12, 30) if done < 0.6 else (30, 129) if done < 0.8 else (128, 129)
        length = int(torch.randint(least, most, (1,), generator=generator))
        text = torch.cat(marked(length, generator, 64 if done < 0.6 else 16), 1)
        logits = model(text).logits[:, length:-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), text[:, length + 1 :].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def editing_prompt(seed: int) -> tuple[list[int], list[int]]:
    """Return a text with the first letter of the next, and that text's rest."""
    (text,), (again,) = marked(TOKENS, torch.Generator().manual_seed(seed))
    return [*text.tolist(), int(again[0])], again[1:].tolist()


def measure_distance(local: Any, rounds: int) -> dict[str, Any]:
    """Compare guessing with plain decoding, next door and far away."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = dagflow.load(local, store=Path(folder, "store"))
        for place, delay in (("near", False), ("far", True)):
            with (
                volunteers(2, Path(folder), delay=delay) as (client, _),
                dagflow.Deployment(model, client, num_stages=2) as deployment,
            ):
                for kind in ("repeating", "random"):
                    name = f"{place}, {kind}"
                    found[name] = measure_guessing(deployment, kind, rounds)
                    print(f"{name}: {found[name]}", flush=True)
    return found


def measure_guessing(deployment: dagflow.Deployment, kind: str, rounds: int) -> dict[str, Any]:
    ratios, rates, plain, repeated = [], [], [], []
    for number in range(rounds + 1):
        prompt, again = editing_prompt(100 + number)
        options = {} if kind == "repeating" else {"temperature": 10.0, "seed": number}
        (a,), slow = over_workers(deployment, [prompt], speculate=False, **options)
        (b,), fast = over_workers(deployment, [prompt], speculate=True, **options)
        assert a == b, "guessing changed the answer"
        if number:  # the first round warms up
            ratios.append(fast / slow)
            rates.append(fast)
            plain.append(slow)
            repeated.append(sum(x == y for x, y in zip(a, again, strict=False)) / len(again))
    return {
        "guessing_of_plain": median(ratios),
        "least": min(ratios),
        "tokens_per_second": median(rates),
        "plain_tokens_per_second": median(plain),
        "as_wanted": median(repeated),
    }


def measure_injected(model: dagflow.Model, rounds: int) -> dict[str, Any]:
    """Kill the worker of some stage after each token with a small probability, and not, in turn."""
    shares, rates, numbers = [], [], []
    for number in range(rounds):
        rng = random.Random(number)
        kills = {n: rng.randrange(2) for n in range(1, MANY_TOKENS) if rng.random() < FAILURE}
        with (
            tempfile.TemporaryDirectory() as folder,
            volunteers(2 + len(kills), Path(folder)) as (client, _),
            dagflow.Deployment(model, client, num_stages=2) as deployment,
        ):
            pids = client.run(os.getpid)
            while len(deployment.engine.placement.spares()) < len(kills):
                time.sleep(0.1)
            answers, both = [], []
            for faults in ({}, kills):
                begin = time.perf_counter()
                found, times = streamed(
                    deployment, random_prompt(number), MANY_TOKENS, faults, pids, signal.SIGKILL
                )
                answers.append(found)
                both.append(len(found) / (times[-1] - begin))
            assert answers[0] == answers[1], "other tokens than undisturbed"
            shares.append(both[1] / both[0])
            rates.append(both[0])
            numbers.append(len(pids) - len(scheduler_info(client)["workers"]))
    return {
        "of_undisturbed": median(shares),
        "shares": shares,
        "kills": numbers,
        "undisturbed_tokens_per_second": median(rates),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = ("speed", "faults", "injected", "distance")
    parser.add_argument("--part", nargs="+", choices=every, default=list(every))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    local = local_model()
    with tempfile.TemporaryDirectory() as store:
        model = dagflow.load(local, store=store)
        measures = {
            "speed": lambda: measure_speed(model, local, options.rounds),
            "faults": lambda: measure_faults(model, local),
            "injected": lambda: measure_injected(model, options.rounds),
            "distance": lambda: measure_distance(editing_model(), options.rounds),
        }
        for part in options.part:
            measured = measures[part]()
            print(f"\n{part}:")
            for name, value in measured.items():
                print(f"  {name:36} {value}")
            write_results("generate", measured, f"generate_{part}")


if __name__ == "__main__":
    main()
