"""The texts of published perplexity tables, by name: data sets of the Hugging Face hub, each with its protocol.

The protocols are those of the tables of GPTQ (arXiv:2210.17323) and any4 (arXiv:2507.04610). Figures of one data set
under two protocols are not comparable: c4 and c4-new, ptb and ptb-new differ by percents.
"""

import dataclasses
import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

Rule = Literal["joined", "documents", "slices"]

_BOS = {
    "joined": "once, before the text",
    "documents": "before each document",
    "slices": "before each document, of which a window is a slice",
}
_WINDOWS = 256
_PILE = "ArmelR/the-pile-splitted"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A data set, and how its documents become one stream of tokens.

    Attributes:
      path, split: on the hub.
      config: the name of its configuration, or None.
      files: a pattern of the files to read, where a configuration would name more or would need code; None for all.
      revision: the branch or commit; None for the main branch.
      field: of a document, that holds its text.
      rule: "joined": documents are joined by `separator`, and the whole is tokenized once; "documents": each is
        tokenized on its own, and the tokens follow one another; "slices": each window is a random slice of a random
        document that is longer, as GPTQ draws them.
      separator: between joined documents.
      documents: only the first so many; None for all.
      windows: the most windows; None for no limit.
    """

    path: str
    split: str
    config: str | None = None
    files: str | None = None
    revision: str | None = None
    field: str = "text"
    rule: Rule = "joined"
    separator: str = "\n\n"
    documents: int | None = None
    windows: int | None = None


_C4 = Corpus("allenai/c4", "validation", files="en/c4-validation.00000-of-00008.json.gz", windows=_WINDOWS)
# The branch that the hub converts to parquet: the main one needs a script, which is never run here.
_PTB = Corpus("ptb-text-only/ptb_text_only", "validation", revision="refs/convert/parquet", field="sentence")

CORPORA: Mapping[str, Corpus] = {
    "wikitext-2": Corpus("Salesforce/wikitext", "test", "wikitext-2-raw-v1"),
    "c4": dataclasses.replace(_C4, rule="slices"),
    "c4-new": dataclasses.replace(_C4, separator=" ", documents=1100),
    "ptb": dataclasses.replace(_PTB, files="penn_treebank/validation/*.parquet"),
    "ptb-new": dataclasses.replace(_PTB, split="test", files="penn_treebank/test/*.parquet", separator=" "),
    "codeparrot": Corpus(
        "huggingface-course/codeparrot-ds-valid", "validation", field="content", rule="documents", windows=_WINDOWS
    ),
    "wikipedia": Corpus("wikimedia/wikipedia", "train", "20231101.en", rule="documents", windows=_WINDOWS),
    "pile": Corpus("monology/pile-uncopyrighted", "test", rule="documents", windows=_WINDOWS),
    **{
        f"pile-{name}": Corpus(_PILE, "test", config, rule="documents", windows=_WINDOWS)
        for name, config in {
            "arxiv": "ArXiv",
            "books": "BookCorpus2",
            "books3": "Books3",
            "math": "DM Mathematics",
            "enron": "Enron Emails",
            "europarl": "EuroParl",
            "freelaw": "FreeLaw",
            "github": "GitHub",
            "subtitles": "OpenSubtitles",
            "openwebtext2": "OpenWebText2",
            "pubmed-central": "PubMed Central",
            "stackexchange": "StackExchange",
            "uspto": "USPTO Backgrounds",
            "ubuntu-irc": "Ubuntu IRC",
            "youtube": "YoutubeSubtitles",
        }.items()
    },
}
"""By name."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """A stream of tokens, and where it comes from.

    Attributes:
      ids: int32 [tokens].
      source: what a result has to tell of it, for JSON: the data set with its revision, the rules, the number of tokens
        and their SHA-256 (of little-endian int32), which is equal for equal tokens alone.
    """

    ids: np.ndarray
    source: Mapping[str, Any]

    @classmethod
    def of(cls, ids: Any, **source: Any) -> "Tokens":
        """Tokens with these facts and their own number and hash."""
        ids = np.asarray(ids, np.int32)
        digest = hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
        return cls(ids, source | {"tokens": len(ids), "tokens_sha256": digest})


def read_corpus(
    name: str | Corpus,
    tokenizer: Any,
    seqlen: int,
    *,
    windows: int | None = None,
    folder: str | Path | None = None,
) -> Tokens:
    """The tokens of a corpus for windows of `seqlen`, by its protocol; needs the package `datasets`.

    Args:
      name: of `CORPORA`, or a corpus of one's own.
      tokenizer: its `encode` maps a text to ids, with the BOS that the model wants; a `bos_id` tells which one it is.
      seqlen: tokens in a window.
      windows: of documents that needn't be joined, read no more than make so many; None for the protocol's.
      folder: holds copies of the data sets, each in a folder of its path; None fetches them from the hub, or takes what
        `datasets` has kept of them.

    Raises:
      ImportError: `datasets` is not installed.
      OSError: the data set can't be had.
      ValueError: there is no corpus of this name, or no document is longer than a window.
    """
    corpus = _named(name)
    rows, revision = _load(corpus, folder)
    most = min((count for count in (windows, corpus.windows) if count is not None), default=None)
    texts: Any = rows if corpus.documents is None else itertools.islice(rows, corpus.documents)
    read = 0

    def counted() -> Iterator[str]:
        nonlocal read
        for row in texts:
            read += 1
            yield row[corpus.field]

    ids: Sequence[int]
    if corpus.rule == "joined":
        ids = tokenizer.encode(corpus.separator.join(counted()))
        ids = ids if corpus.windows is None else ids[: corpus.windows * seqlen]
    elif corpus.rule == "documents":
        ids = _one_after_another(counted(), tokenizer, None if most is None else most * seqlen)
    else:
        documents = list(counted())
        ids = _slices(documents, tokenizer, seqlen, _WINDOWS if most is None else most)
    return Tokens.of(
        ids,
        dataset=corpus.path,
        config=corpus.config,
        files=corpus.files,
        split=corpus.split,
        revision=revision,
        field=corpus.field,
        documents=read,
        rule=corpus.rule,
        separator=corpus.separator if corpus.rule == "joined" else None,
        bos=bos_rule(tokenizer, corpus.rule),
    )


def bos_rule(tokenizer: Any, rule: Rule = "joined") -> str:
    """In words, where a tokenizer's token for the begin of a text stands in a stream made by a rule."""
    bos = getattr(tokenizer, "bos_id", None)
    return _BOS[rule] if bos is not None and list(tokenizer.encode("a"))[:1] == [bos] else "none"


def _named(name: str | Corpus) -> Corpus:
    if isinstance(name, Corpus):
        return name
    if name not in CORPORA:
        raise ValueError(f"got the corpus {name!r}, and one of {', '.join(CORPORA)} is needed; pass one of these")
    return CORPORA[name]


def _load(corpus: Corpus, folder: str | Path | None) -> tuple[Iterable[Mapping[str, str]], str | None]:
    """The documents, and the commit that they are of, if that can be known."""
    try:
        import datasets
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError(
            f"{corpus.path} needs the package datasets, which isn't installed ({error}); run pip install "
            "'any4_jax[eval]', or measure on a text of your own"
        ) from error
    path, revision = corpus.path, corpus.revision
    offline = False
    if folder is not None:
        path, revision = str(Path(folder) / corpus.path), None
        if not Path(path).is_dir():
            raise OSError(
                f"{path} is missing, and a copy of the data set is needed there; download it, or name no folder"
            )
    else:
        try:
            revision = HfApi().dataset_info(corpus.path, revision=corpus.revision).sha
        except Exception:  # of a dozen types
            # What `datasets` has kept serves, whose commit it doesn't tell. Asked to, it doesn't try the network again.
            offline = True
    only = {} if corpus.files is None else {"data_files": {corpus.split: corpus.files}}
    # A stream reads what is asked of it, where whole data sets take gigabytes.
    streamed = corpus.rule == "documents" and corpus.windows is not None
    before = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = before or offline
        rows = datasets.load_dataset(
            path, corpus.config, split=corpus.split, revision=revision, streaming=streamed, **only
        )
    except Exception as error:  # the package raises dozens of types for this one failure
        raise OSError(
            f"{corpus.path} can't be had ({type(error).__name__}); connect to the network, give a folder with a copy "
            "of it, or measure on a text of your own"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    commit = revision if revision is not None and len(revision) == 40 else None
    return rows, commit


def _one_after_another(texts: Iterable[str], tokenizer: Any, most: int | None) -> list[int]:
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text)
        if most is not None and len(ids) >= most:
            return ids[:most]
    return ids


def _slices(documents: Sequence[str], tokenizer: Any, seqlen: int, count: int) -> list[int]:
    """`count` windows: draws a document until one is longer than a window, then where in it the window begins."""
    draw, short, ids = random.Random(0), set[int](), list[int]()
    for _ in range(count):
        while True:
            if len(short) == len(documents):
                raise ValueError(
                    f"no document has more than {seqlen} tokens, and a window needs one; take a smaller seqlen"
                )
            index = draw.randint(0, len(documents) - 1)
            tokens = tokenizer.encode(documents[index])
            if len(tokens) > seqlen:
                break
            short.add(index)
        first = draw.randint(0, len(tokens) - seqlen - 1)
        ids += tokens[first : first + seqlen]
    return ids
