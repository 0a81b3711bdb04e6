"""Write what lm-evaluation-harness's own backend "hf" finds with the bundled model, which no test needs.

    python tests/golden/make_harness.py

It needs lm_eval[hf], transformers 4 and torch. harness.json holds, in float32 on a CPU, for each context and
continuation the log-likelihood in nats and whether it is the likeliest one, the log-likelihood of whole texts in
windows of 64 tokens, and the answers to prompts with the settings that a task would give. The loss of windows of 128
tokens is that of transformers alone.
"""

import json
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

FOLDER = Path(__file__).parent
DATA = FOLDER.parent.parent / "any4_jax" / "data"
STORIES = (DATA / "stories.txt").read_text()
CONTEXT = "Once upon a time, there was a little girl named Lily. She loved to play with her"
PAIRS = [
    (CONTEXT, " toys in the garden."),
    (CONTEXT, " dog"),
    (CONTEXT, " cat"),
    (CONTEXT, " a"),
    (CONTEXT, " b"),
    (CONTEXT + "  ", "friends"),
    (CONTEXT + "\n", "One day, she saw a bird."),
    ("", "Once upon a time"),
    ("", "Lily was sad."),
    ("<s>" + CONTEXT, " mom"),
    ("Tom", " and Sue went to the park."),
    (STORIES, " They were happy."),
    (STORIES[:3000], STORIES[3000:3400]),
]
TEXTS = ["Tom had a red ball.", STORIES[:700], STORIES[700:1500]]
WINDOWS, SEQLEN = 6, 128
STOP = {"max_gen_toks": 24, "do_sample": False}
ANSWERS = [
    ("Once upon a time, there was a little", STOP | {"until": ["."]}),
    ("Tom and Sue went to the", STOP | {"until": ["."]}),
    ("One day, a boy", {"until": [" the", "\n"], "max_gen_toks": 24, "temperature": 0.0}),
    ("The end", {"until": [], "max_gen_toks": 24}),
    (STORIES, STOP | {"until": ["."]}),
]


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def main() -> None:
    settings = dict(pretrained=str(DATA / "stories260k"), dtype="float32", device="cpu", batch_size=1)
    torch.manual_seed(0)
    model, short = HFLM(**settings), HFLM(**settings, max_length=64)
    pairs = model.loglikelihood(instances("loglikelihood", PAIRS))
    texts = short.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in TEXTS]))
    answers = model.generate_until(instances("generate_until", ANSWERS))
    ids = model.tokenizer(STORIES, return_tensors="pt").input_ids[0, : WINDOWS * SEQLEN].reshape(WINDOWS, SEQLEN)
    with torch.no_grad():
        nats = [float(model.model(row[None], labels=row[None]).loss) for row in ids]
    content = {
        "window_nats_per_token": nats,
        "pairs": [[*pair, *found] for pair, found in zip(PAIRS, pairs, strict=True)],
        "texts": list(zip(TEXTS, texts, strict=True)),
        "answers": [[*asked, text] for asked, text in zip(ANSWERS, answers, strict=True)],
    }
    (FOLDER / "harness.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
