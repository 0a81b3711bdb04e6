"""Write a tiny GGUF file of every family with llama.cpp's own converter, and llama.cpp's logits of each.

    python tests/golden/make_gguf_families.py LLAMA_CPP

LLAMA_CPP is a folder that holds convert_hf_to_gguf.py, conversion/ and gguf-py/ of llama.cpp, as the source archive of
llama-cpp-python does in vendor/llama.cpp. torch, transformers 5, sentencepiece and llama-cpp-python are needed too, and
no test needs any of them. The files here come from the converter in llama-cpp-python 0.3.36; their logits were computed
by the library in xllamacpp 2026.10.11549, behind the few calls of llama-cpp-python that `run` makes.

gguf_<name>.gguf are float16 files: the weights are float16 numbers, so nothing is rounded. family_gguf.npz holds, as
<name>/config, /tokens, /logits, /torch and /text_ids: config.json, tokens int32 [T], llama.cpp's and torch's logits
float32 [T, V], and llama.cpp's ids of TEXT. llama.cpp rounds activations to float16 beside float16 weights, so its
logits are those of the same conversion to float32; the script checks that they are torch's. Only Gemma's differ by
more than rounding, because llama.cpp takes GELU from a table of float16 numbers; the check does the same in torch.
"""

import argparse
import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from make_families import FOLDER, GEMMA3, LLAMA, VARIANTS, YARN, build, logits_of
from safetensors.numpy import save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

TEXT = "the hat is in the sea\nthat is it"
LENGTH = 40
LETTERS = "etaoinshrdlucmfwypvbgk,."
MERGES = ["t h", "th e", "h e", "i n", "i s", "a t", "h at", "s e", "se a", "i t"]
# name -> config.json. llama.cpp divides Gemma's scores by the root of the head size, whatever query_pre_attn_scalar
# is, makes every second (Gemma 2) or sixth layer (Gemma 3) global, drops Mistral's window, and ignores yarn's betas
# in its llama architecture (so that context is long enough for the usual betas to blend a frequency).
CASES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama_linear": VARIANTS["rope_linear"][0],
    "llama_yarn": LLAMA
    | {"max_position_embeddings": 16384, "rope_scaling": YARN | {"original_max_position_embeddings": 4096}},
    "mistral": VARIANTS["mistral_no_window"][0],
    "qwen2": VARIANTS["qwen2"][0],
    "qwen3": VARIANTS["qwen3"][0],
    "gemma2": VARIANTS["gemma2"][0] | {"query_pre_attn_scalar": 16},
    "gemma3": GEMMA3 | {"query_pre_attn_scalar": 16, "final_logit_softcapping": 30.0},
    "mixtral": VARIANTS["mixtral"][0],
    "qwen3_moe": VARIANTS["qwen3_moe"][0],
}


def write_sentencepiece(folder: Path, config: dict[str, Any]) -> None:
    """tokenizer.model: control tokens where the config has them, then letters, then joined pieces."""
    special = {config["bos_token_id"]: "<s>", config["eos_token_id"]: "</s>"}
    if config.get("pad_token_id") is not None:
        special[config["pad_token_id"]] = "<pad>"
    unknown = next(index for index in range(4) if index not in special)
    proto = ModelProto()
    for index in range(max(*special, unknown) + 1):
        kind = ModelProto.SentencePiece.UNKNOWN if index == unknown else ModelProto.SentencePiece.CONTROL
        proto.pieces.add(piece=special.get(index, "<unk>"), score=0.0, type=kind)
    joined = [*(pair.replace(" ", "") for pair in MERGES), "\u2581t", "\u2581the"]
    for rank, piece in enumerate([*joined, "\u2581", "\n", *LETTERS]):
        proto.pieces.add(piece=piece, score=-float(rank))
    proto.trainer_spec.model_type = 2  # BPE
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.trainer_spec.unk_id = unknown
    proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = config["bos_token_id"], config["eos_token_id"]
    proto.trainer_spec.pad_id = -1 if config.get("pad_token_id") is None else config["pad_token_id"]
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = not config["model_type"].startswith("gemma")
    proto.normalizer_spec.remove_extra_whitespaces = False
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())


def write_byte_level(folder: Path) -> None:
    """tokenizer.json: byte-level BPE, whose first tokens are the special ones of Qwen."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pairs = [*MERGES, "\u0120 t", "\u0120 the"]
    # "\u0120" and "\u010a" are a space and a line feed in the alphabet of byte-level BPE.
    tokens = [*special, "\u0120", "\u010a", *LETTERS, *(pair.replace(" ", "") for pair in pairs)]
    merges = [tuple(pair.split(" ")) for pair in pairs]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[2], pad_token=special[0], clean_up_tokenization_spaces=False
    ).save_pretrained(folder)


def convert(folder: Path, path: Path, dtype: str, name: str) -> None:
    """Run llama.cpp's converter in this process."""
    import convert_hf_to_gguf
    from conversion.base import TextModel

    # The converter knows a pre-tokenizer by what the whole vocabulary does to a text; this one is too small for that.
    TextModel.get_vocab_base_pre = lambda *_: "qwen2"
    sys.argv = ["convert", str(folder), "--outfile", str(path), "--outtype", dtype, "--model-name", name]
    convert_hf_to_gguf.main()


def run(path: Path, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """llama.cpp's logits float32 [T, V], and its ids of TEXT."""
    float32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        str(path), n_ctx=64, logits_all=True, n_threads=1, type_k=float32, type_v=float32, verbose=False
    )
    model.eval(tokens.tolist())
    logits = np.array(model.scores[: len(tokens)], np.float32)
    ids = model.tokenize(TEXT.encode(), add_bos=True, special=False)
    model.close()
    return logits, np.array(ids, np.int32)


def tabulated_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU as llama.cpp looks it up: of x in float16, rounded to float16."""
    return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


def main() -> None:
    """Write one GGUF file a case, and the logits of all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("llama_cpp", type=Path)
    sys.path.insert(0, str(parser.parse_args().llama_cpp))
    logging.disable_progress_bar()
    results: dict[str, Any] = {}
    for name, config in CASES.items():
        seed = zlib.crc32(name.encode())
        model, tensors, _ = build(config, seed)
        tokens = np.random.default_rng(seed + 1).integers(0, config["vocab_size"], LENGTH).astype(np.int32)
        path = FOLDER / f"gguf_{name}.gguf"
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / "config.json").write_text(json.dumps(config))
            # In float32, because the converter adds 1 to Gemma's norms in the dtype of the checkpoint.
            wide = {key: value.astype(np.float32) for key, value in tensors.items()}
            save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
            write_byte_level(folder) if "qwen" in name else write_sentencepiece(folder, config)
            convert(folder, path, "f16", name)
            convert(folder, folder / "float32.gguf", "f32", name)
            logits, ids = run(folder / "float32.gguf", tokens)
        exact = logits_of(model, tokens[None], (LENGTH,))[0]
        if "hidden_activation" in config:
            for layer in model.model.layers:
                layer.mlp.act_fn.forward = tabulated_gelu
        error = np.abs(logits - logits_of(model, tokens[None], (LENGTH,))[0]).max()
        rounded = np.abs(logits - run(path, tokens)[0]).max()
        shown = {"torch": error, "exact GELU": np.abs(logits - exact).max(), "float16": rounded}
        print(f"{path.name}: {path.stat().st_size} bytes, {np.abs(exact).max():.1f} at most", shown, flush=True)
        # Two numbers that differ in their last bit may fall on two sides of a float16 of the table.
        if error > (1e-3 if "hidden_activation" in config else 1e-4):
            raise AssertionError(f"{name}: llama.cpp's logits are {error} from torch's")
        parts = {"config": json.dumps(config), "tokens": tokens, "logits": logits, "torch": exact, "text_ids": ids}
        results |= {f"{name}/{part}": value for part, value in parts.items()}
    np.savez_compressed(FOLDER / "family_gguf.npz", text=TEXT, **results)


if __name__ == "__main__":
    main()
