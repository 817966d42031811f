"""Fine-tune a Hugging Face language model on text files (needs transformers).

::

    python examples/finetune_hf.py path/to/model --text 'notes/*.md' --precision bf16
    python examples/finetune_hf.py           # to try it: a tiny GPT-2 that knows nothing yet

The folder is one that ``save_pretrained`` writes: configuration, safetensors, tokenizer. Another
such folder comes out, given by ``--output``. Without a folder, a tiny GPT-2 with random weights and
a tokenizer of bytes is made in a temporary place, so that nothing has to be downloaded.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
)

import dagflow
from dagflow.demo.text import find_files, python_library


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or tiny_model(Path(temporary, "tiny-gpt2"))
        finetune(folder, options)


def finetune(folder: str, options: argparse.Namespace) -> None:
    """Train the folder's model on the files, and save it as another folder."""
    # Neither code nor pickles that come with a model are run.
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    # Caches are for generation; a training graph has no use for them.
    model.config.use_cache = False
    files = find_files(options.text) if options.text else python_library()[:200]
    tokens_url = f"{options.store.rstrip('/')}-tokens"
    count = dagflow.TokenDataset.write(tokens_url, encoded(files, tokenizer), dtype="uint32")
    print(f"{len(files)} files, {count:,} tokens, {model.num_parameters() / 1e6:.1f} M parameters")
    result = dagflow.train(
        model,
        # These models shift the labels themselves.
        dagflow.TokenDataset(
            tokens_url, batch_size=options.batch, sequence_length=options.context, shifted=False
        ),
        optimizer=dagflow.Optimizer("AdamW", lr=options.lr, weight_decay=0.01),
        schedule=dagflow.Schedule("linear", warmup_steps=min(20, options.steps // 5)),
        clip_grad_norm=1.0,
        steps=options.steps,
        num_stages=options.stages or "auto",
        num_microbatches=options.microbatches,
        precision=options.precision,
        store=options.store,
        client=options.scheduler,
    )
    model.load_state_dict(result.state_dict())
    model.config.use_cache = True
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}; saved in {options.output}")


def encoded(files: list[Path], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Tokens of one file after the other."""
    for path in files:
        text = path.read_text("utf-8", errors="replace")
        yield np.asarray(tokenizer(text, verbose=False)["input_ids"], np.uint32)


def tiny_model(folder: Path) -> str:
    """Make a model folder of 0.4 million parameters and 256 tokens, and say so."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    print("No model given: making a tiny GPT-2 with random weights and a token for each byte.")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_embd": 96, "n_layer": 4, "n_head": 4, "n_positions": 256}
    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", help="folder of a causal language model")
    add("--text", nargs="*", help="files, folders or globs; some of Python's library by default")
    add("--output", default="runs/finetuned", help="folder for the result")
    add("--steps", type=int, default=60)
    add("--batch", type=int, default=16)
    add("--microbatches", type=int, default=4)
    add("--context", type=int, default=128)
    add("--lr", type=float, default=1e-3)
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    add("--stages", type=int, help="one a worker by default")
    add("--store", default="runs/finetune_hf", help="folder or URL that the workers see, too")
    add("--scheduler", help="address of a dask scheduler; workers are started here by default")
    return parser.parse_args()


if __name__ == "__main__":
    main()
