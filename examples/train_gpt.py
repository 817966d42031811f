"""Train a GPT on text files, on this machine's cores or on a cluster of lent machines.

::

    python examples/train_gpt.py                                  # Python's own library, bytes
    python examples/train_gpt.py --text 'books/*.txt' --steps 2000
    python examples/train_gpt.py --tokens bpe --vocabulary 4096 --layers 8 --width 512
    python examples/train_gpt.py --scheduler tcp://10.0.0.7:8786 --store s3://bucket/gpt --stages 4

It writes the tokens as a zarr array that the workers read themselves, shows the plan (which
operators became which stage) and a line of progress, and ends with the loss on text held out and a
sample. Run it again with the same ``--store`` and it goes on where it was.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

import dagflow
from dagflow.demo.gpt import GPT, mean_loss, sample
from dagflow.demo.text import (
    BytePairTokenizer,
    ByteTokenizer,
    Tokenizer,
    find_files,
    python_library,
    tokens_of,
)


def main() -> None:
    options = arguments()
    files = find_files(options.text) if options.text else python_library()
    tokenizer: Tokenizer = ByteTokenizer()
    if options.tokens == "bpe":
        tokenizer = BytePairTokenizer(files, options.vocabulary)
    # Beside the run, not in it: a new run on the same text takes another --store.
    tokens_url = f"{options.store.rstrip('/')}-tokens"
    count = dagflow.TokenDataset.write(tokens_url, tokens_of(files, tokenizer))
    print(f"{len(files)} files, {count:,} tokens, a vocabulary of {tokenizer.vocab_size}")

    torch.manual_seed(options.seed)
    model = GPT(
        tokenizer.vocab_size,
        width=options.width,
        num_layers=options.layers,
        num_heads=options.heads,
        context=options.context,
        dropout=options.dropout,
    )
    result = dagflow.train(
        model,
        dagflow.TokenDataset(tokens_url, batch_size=options.batch, sequence_length=options.context),
        optimizer=dagflow.Optimizer("AdamW", lr=options.lr, weight_decay=0.1),
        schedule=dagflow.Schedule("cosine", warmup_steps=min(50, options.steps // 10)),
        clip_grad_norm=1.0,
        steps=options.steps,
        num_stages=options.stages or "auto",
        num_microbatches=options.microbatches,
        precision=options.precision,
        seed=options.seed,
        store=options.store,
        client=options.scheduler,
    )
    model.load_state_dict(result.state_dict())
    unseen = np.concatenate(list(tokens_of(files, tokenizer, held_out=True)))
    print(f"loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f} nats a token")
    print(f"on text it never saw: {mean_loss(model, torch.tensor(unseen)):.3f}")
    prompt = torch.tensor(tokenizer.encode(options.prompt.encode()).astype(np.int64))
    print(tokenizer.decode(sample(model, prompt, 300, seed=options.seed).tolist()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--text", nargs="*", help="files, folders or globs")
    add("--tokens", choices=("bytes", "bpe"), default="bytes")
    add("--vocabulary", type=int, default=2048, help="of bpe")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=192)
    add("--heads", type=int, default=4)
    add("--context", type=int, default=128)
    add("--dropout", type=float, default=0.0)
    add("--batch", type=int, default=16, help="sequences a step")
    add("--microbatches", type=int, default=4)
    add("--steps", type=int, default=400)
    add("--lr", type=float, default=3e-3)
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    add("--stages", type=int, help="one a worker by default")
    add("--store", default="runs/train_gpt", help="folder or URL that the workers see, too")
    add("--scheduler", help="address of a dask scheduler; workers are started here by default")
    add("--prompt", default="def ")
    add("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
