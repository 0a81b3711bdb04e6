"""Compares greedy decoding of SmolLM2-135M here and in llama.cpp, in one run: tokens per second of one row.

    make demo                            # leaves the checkpoint any4-demo
    CMAKE_ARGS="-DGGML_NATIVE=ON" .venv/bin/pip install llama-cpp-python
    .venv/bin/python examples/benchmarks/against_llama_cpp.py any4-demo

llama.cpp runs the published file in Q4_1, and files in Q4_0 and IQ4_NL that its own tool makes from it (for speed only:
a second quantization costs quality). Both engines get the same prompt, and one thread for each core that the process
may use; `taskset` gives fewer. If a virtual machine shows AMX but can't run it, build with -DGGML_NATIVE=OFF and name
the instruction sets (-DGGML_AVX512=ON ...). This file can't be called llama_cpp.py: it would import itself.

Let nothing else run meanwhile: the threads of llama.cpp spin while they wait for each other, and a thread that another
process delayed has cost it a factor of ten.
"""

import argparse
import ctypes
import dataclasses
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGUFReader

from any4_jax import benchmarks
from any4_jax.benchmarks import contestants, decode, machine
from any4_jax.benchmarks.timing import StreamingRead
from any4_jax.cli.bench_decode import decode_table
from any4_jax.cli.numbers import at_least, count
from any4_jax.cli.sources import MODEL_HELP, add_inputs, open_model
from any4_jax.data.assets import fetch_smollm2

REQUANTIZED = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "IQ4_NL": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help=f"for this library: a checkpoint, {MODEL_HELP}")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="for llama.cpp, in Q4_1 (default: SmolLM2, fetched)")
    add_inputs(parser, "time each model twice, also while its")
    parser.add_argument("--prompt-tokens", type=count, default=32)
    parser.add_argument("--tokens", type=at_least(2), default=128)
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--out", metavar="FILE", help="write the results here as JSON")
    args = parser.parse_args()

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    llama_cpp.llama_backend_init()
    source = args.gguf or fetch_smollm2()
    slots = args.prompt_tokens + args.tokens
    with tempfile.TemporaryDirectory() as folder:
        made = {"Q4_1": llama(source, "Q4_1", slots)}
        for name, kind in REQUANTIZED.items():
            made[name] = llama(requantized(source, Path(folder) / f"{name}.gguf", kind), name, slots)
    for name, label in contestants.labels(args.models).items():
        model = open_model(name)
        ours = {label: contestants.contestant(label, model)}
        if args.inputs is not None:
            ours = contestants.with_rounded_inputs(label, model)
        made |= {
            key: dataclasses.replace(each, facts={"engine": "any4_jax", **each.facts}) for key, each in ours.items()
        }

    stream = StreamingRead(machine.platform())
    rows, _ = decode.run(
        {name: contestants.Entry.of(each) for name, each in made.items()},
        decode.Decode((args.prompt_tokens,), (1,), args.tokens, args.rounds),
        stream=stream,
        progress=lambda done, total, name: print(f"{done + 1} of {total}: {name}", file=sys.stderr),
    )
    print(decode_table(rows, ("engine", "model", "method", "head", "dtype")))
    if args.out:
        settings = {"tokens": args.tokens, "rounds": args.rounds}
        result = benchmarks.result(
            "against_llama_cpp",
            ["python", *sys.argv],
            settings=settings | {"threads": machine.cores()} | stream.settings(),
            rows=rows,
            packages=["llama_cpp_python"],
        )
        benchmarks.write(args.out, result)


def requantized(source: Path, target: Path, kind: int) -> Path:
    """The model in another of llama.cpp's formats, as a new file."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.allow_requantize, settings.nthread = kind, True, machine.cores()
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings))
    if failed:
        raise SystemExit(f"llama.cpp could not make {target.name} from {source}; give the published file in Q4_1")
    return target


def llama(path: Path, method: str, slots: int) -> contestants.Contestant:
    """A GGUF model in llama.cpp, through its C interface, because its Python classes copy the logits at each step."""
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = slots
    settings.n_threads = settings.n_threads_batch = machine.cores()
    context = llama_cpp.llama_init_from_model(model, settings) if model else None
    if not context:
        raise SystemExit(f"llama.cpp could not load {path}; give a GGUF file of a Llama")
    greedy = llama_cpp.llama_sampler_init_greedy()

    def step(ids: list[int]) -> int:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(ids))) != 0:
            raise SystemExit(f"llama.cpp could not decode with {path}; build it without the instructions that fail")
        return llama_cpp.llama_sampler_sample(greedy, context, -1)

    def chunks(prompts: np.ndarray, tokens: int) -> Iterator[list[list[int]]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        (ids,) = prompts.tolist()
        for _ in range(tokens):
            ids = [step(ids)]
            yield [ids]

    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    untied = "output.weight" in tensors
    read = sum(int(tensor.n_bytes) for name, tensor in tensors.items() if not untied or name != "token_embd.weight")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    head = tensors["output.weight" if untied else "token_embd.weight"].tensor_type.name
    model_facts = {"model": path.name, "method": method, "head": head, "dtype": "float32, float16 cache"}
    return contestants.Contestant(chunks, read, vocabulary, {"engine": "llama.cpp", **model_facts})


if __name__ == "__main__":
    main()
