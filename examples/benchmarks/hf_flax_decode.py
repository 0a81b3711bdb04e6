"""Tokens per second of Hugging Face's FlaxLlama by its own `generate`: with float weights, and with the kernels of its
dense layers swapped for few bits, and nothing else changed. Weights are random, in the shape of Llama-3.2-1B.

    pip install "any4_jax[hf-flax]"
    python examples/benchmarks/hf_flax_decode.py --out FILE

`generate` is jitted as a whole, since transformers runs its first step operation by operation otherwise. It gives all
tokens at its end; so the speed of decoding is that of what a call with more new tokens takes longer than one with one.
The head is a matrix of its own, because FlaxLlama has no other, and stays in bfloat16.
"""

import argparse
import dataclasses
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from any4_jax import benchmarks
from any4_jax.benchmarks import shapes
from any4_jax.benchmarks.timing import significant
from any4_jax.cli.numbers import at_least, count
from any4_jax.methods import Method
from any4_jax.models.flax_llama import abstract_flax_llama
from any4_jax.models.hf_flax import dense_paths, with_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=shapes.CONFIGS, default="llama-3.2-1b", help="(default: llama-3.2-1b)")
    parser.add_argument("--methods", nargs="+", choices=shapes.METHODS, default=["bfloat16", "any4"])
    parser.add_argument("--prompt-tokens", type=count, default=128)
    parser.add_argument("--tokens", type=at_least(2), default=129, help="new tokens, 2 or more")
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--out", metavar="FILE", help="write the results here as JSON")
    args = parser.parse_args()

    vocabulary = shapes.CONFIGS[args.shape].vocab_size
    prompt = jnp.asarray(np.random.default_rng(0).integers(0, vocabulary, (1, args.prompt_tokens)), jnp.int32)
    models = {name: random_model(args.shape, shapes.METHODS[name]) for name in args.methods}
    programs = {(name, tokens): program(model, tokens) for name, model in models.items() for tokens in (1, args.tokens)}
    seconds: dict[tuple[str, int], list[float]] = {job: [] for job in programs}
    for turn in range(args.rounds + 1):
        for job, run in programs.items():
            print(f"round {turn} of {args.rounds}: {job[0]}, {job[1]} tokens", file=sys.stderr)
            begin = time.perf_counter()
            got = np.asarray(run(models[job[0]].params, prompt))
            seconds[job].append(time.perf_counter() - begin)
            if got.shape[1] != args.prompt_tokens + job[1]:
                raise SystemExit(f"{job[0]} stopped after {got.shape[1] - args.prompt_tokens} of {job[1]} tokens")
    median = {job: float(np.median(taken[1:])) for job, taken in seconds.items()}
    decode = {name: median[name, args.tokens] - median[name, 1] for name in models}
    rows = [
        {
            "method": name,
            "prefill_ms": significant(1e3 * median[name, 1]),
            "compile_s": significant(seconds[name, args.tokens][0] - median[name, args.tokens]),
            "decode_tokens_per_s": significant((args.tokens - 1) / decode[name]),
            "decode_ms_per_token": significant(1e3 * decode[name] / (args.tokens - 1)),
            "speed_ratio_to_first": significant(decode[args.methods[0]] / decode[name]),
        }
        for name in models
    ]
    for row in rows:
        print(row)
    if args.out:
        settings = {name: getattr(args, name) for name in ("shape", "prompt_tokens", "tokens", "rounds")}
        words, packages = ["python", *sys.argv], ["transformers"]
        benchmarks.write(
            args.out, benchmarks.result("hf_flax_decode", words, settings=settings, rows=rows, packages=packages)
        )


def random_model(shape: str, method: Method | None) -> Any:
    """A FlaxLlama in bfloat16 whose dense layers, except the head, are stored by the method; None leaves them float."""
    config = dataclasses.asdict(shapes.CONFIGS[shape])
    del config["eos_token_ids"]
    # No token has this id, so that every call decodes equally many.
    end = {"eos_token_id": config["vocab_size"]}
    hf = abstract_flax_llama(config | end | {"model_type": "llama"}, jnp.bfloat16)
    dense = {(*path.split("."), "kernel") for path in dense_paths(hf) if path != "lm_head"}
    filled = {}
    for seed, (path, leaf) in enumerate(flatten_dict(hf.params).items()):
        coded = method is not None and path in dense
        filled[path] = (
            shapes.random_weight(seed, *leaf.shape[::-1], method)
            if coded
            else shapes.random_array(seed, leaf.shape, jnp.bfloat16)
        )
    return with_params(hf, unflatten_dict(filled))


def program(model: Any, tokens: int) -> Any:
    """(parameters, prompt int32 [1, T]) -> int32 [1, T + tokens]."""

    def run(params: Any, prompt: jax.Array) -> jax.Array:
        given = model.generate(prompt, params=params, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return given.sequences

    return jax.jit(run)


if __name__ == "__main__":
    main()
