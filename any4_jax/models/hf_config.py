"""Shared by the families' readers of `config.json`, which transformers 4 and 5 write in different forms."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from any4_jax.models.config import LlamaConfig
from any4_jax.models.rope_scaling import KINDS, AnyScaling
from any4_jax.schema import Count, Index, Name, Positive, Schema, check

CONFIG = "config.json"
ADVICE = "take the file that belongs to the weights"

S = TypeVar("S", bound="DecoderFile")
C = TypeVar("C", bound=LlamaConfig)


class GenerationFile(Schema):
    """What is read of generation_config.json."""

    eos_token_id: Index | tuple[Index, ...] | None = None


class DecoderFile(Schema):
    """The keys of config.json that decoders with the blocks of Llama share; a family's subclass has its defaults.

    Attributes:
        rope_scaling: of transformers 4, which has rope_theta beside it.
        rope_parameters: of transformers 5, which has rope_theta in it.
        layer_types: "full_attention" or "sliding_attention" for each block.
    """

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    max_position_embeddings: Count = 2048
    rms_norm_eps: Positive = 1e-6
    hidden_act: Name = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: Index | None = 1
    eos_token_id: Index | tuple[Index, ...] | None = 2
    rope_theta: Positive = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    original_max_position_embeddings: Count | None = None
    partial_rotary_factor: Positive = 1.0
    sliding_window: Count | None = None
    layer_types: tuple[Name, ...] | None = None


def read(schema: type[S], config: Mapping[str, Any]) -> S:
    """config.json by a schema.

    Raises:
        ValueError: a key is missing or has a value that doesn't fit.
    """
    return check(schema, dict(config), CONFIG, ADVICE)


def build(
    cls: type[C], file: DecoderFile, generation: Mapping[str, Any] | None, activations: tuple[str, ...], **own: Any
) -> C:
    """The config of a family from a file that it has read.

    Args:
        cls: the class of the config.
        file: what config.json says.
        generation: the content of generation_config.json; its eos_token_id, if it has one, takes precedence.
        activations: the values of hidden_act that mean the family's activation.
        own: the fields that `file` doesn't have under the same name, and those that replace its own.

    Raises:
        ValueError: the activation, the rope type or a partial rotation is not supported, or a number contradicts
            another.
    """
    refuse_activation("hidden_act", file.hidden_act, activations)
    heads = file.num_attention_heads
    if file.head_dim is None and file.hidden_size % heads:
        raise ValueError(
            f"hidden_size={file.hidden_size} is not a multiple of num_attention_heads={heads}; set head_dim in "
            "config.json"
        )
    if file.partial_rotary_factor != 1:
        raise ValueError(
            f"{CONFIG}: partial_rotary_factor is {file.partial_rotary_factor}, and only 1 is supported; take another "
            "model"
        )
    theta, scaling = rope(file)
    fields = dict(
        vocab_size=file.vocab_size,
        hidden_size=file.hidden_size,
        intermediate_size=file.intermediate_size,
        num_hidden_layers=file.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=file.num_key_value_heads or heads,
        head_dim=file.head_dim or file.hidden_size // heads,
        max_position_embeddings=file.max_position_embeddings,
        rms_norm_eps=file.rms_norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=file.tie_word_embeddings,
        attention_bias=file.attention_bias,
        mlp_bias=file.mlp_bias,
        bos_token_id=file.bos_token_id,
        eos_token_ids=eos_ids(file.eos_token_id, generation),
    )
    try:
        return cls(**fields | own)
    except ValueError as error:
        raise ValueError(f"{CONFIG}: {error}; {ADVICE}") from None


def refuse_activation(key: str, found: str, known: tuple[str, ...]) -> None:
    """Raises ValueError unless the activation is one of those known."""
    if found not in known:
        raise ValueError(f"{key} {found!r} is not supported, only {' and '.join(known)} are; take another model")


def rope(file: DecoderFile) -> tuple[float, AnyScaling | None]:
    """The base of the rotary frequencies and their scaling.

    Raises:
        ValueError: the rope type is unknown, or one of its numbers is missing or doesn't fit.
    """
    parameters = file.rope_parameters or file.rope_scaling or {}
    theta = check(_Theta, parameters, f"rope_parameters of {CONFIG}", ADVICE).rope_theta or file.rope_theta
    return theta, scaling(parameters, file.max_position_embeddings, file.original_max_position_embeddings)


class _Theta(Schema):
    rope_theta: Positive | None = None
    partial_rotary_factor: Positive = 1.0


def scaling(parameters: Mapping[str, Any], context: int, original: int | None) -> AnyScaling | None:
    """The scaling that `rope_scaling` or `rope_parameters` describes; None if frequencies stay as they are.

    Args:
        parameters: keys and values.
        context: max_position_embeddings.
        original: original_max_position_embeddings of the config itself, which Phi-3 has.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(map(repr, ("default", *KINDS)))
        raise ValueError(f"rope type {repr(kind)[:60]} is not supported, only {known} are; take another model")
    source = f"the {kind} rope scaling of {CONFIG}"
    content = {"original_max_position_embeddings": context} if kind != "llama3" else {}
    content |= {key: value for key, value in parameters.items() if value is not None} | {"rope_type": kind}
    if kind == "dynamic":
        # transformers reckons from the context of the config, whatever is said here.
        content["original_max_position_embeddings"] = context
    if kind == "longrope":
        content |= _long(parameters, context, original, source)
    return check(KINDS[kind], content, source, ADVICE)


class _Long(Schema):
    factor: Positive | None = None
    attention_factor: Positive | None = None
    original_max_position_embeddings: Count | None = None


def _long(parameters: Mapping[str, Any], context: int, original: int | None, source: str) -> dict[str, Any]:
    """The numbers of longrope that transformers derives: the original context, and the attention factor of LongRoPE
    (arXiv:2402.13753, section 3.3)."""
    given = check(_Long, dict(parameters), source, ADVICE)
    original = original or given.original_max_position_embeddings
    factor = given.factor if original is None else context / original
    original = original or context
    if given.attention_factor is None and factor is None:
        raise ValueError(f"{source} lacks factor; {ADVICE}")
    grown = 1.0 if factor is None or factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {"original_max_position_embeddings": original, "attention_factor": given.attention_factor or grown}


def eos_ids(own: int | tuple[int, ...] | None, generation: Mapping[str, Any] | None) -> tuple[int, ...]:
    """The ids of the tokens that end a text; those in generation_config.json, if any, take precedence.

    Args:
        own: the eos_token_id of config.json.
        generation: the content of generation_config.json.
    """
    given = check(GenerationFile, dict(generation or {}), "generation_config.json", ADVICE).eos_token_id
    ids = own if given is None else given
    return () if ids is None else (ids,) if isinstance(ids, int) else ids


def windows(file: DecoderFile, window: int | None, sliding: tuple[bool, ...]) -> tuple[int | None, ...]:
    """The attention window of each block, None for all tokens.

    Args:
        file: its layer_types decide, if it has them.
        window: the size.
        sliding: whether each block has it, if the file doesn't say.
    """
    kinds = ("full_attention", "sliding_attention")
    if file.layer_types is not None:
        odd = sorted(set(file.layer_types) - set(kinds))
        if odd or len(file.layer_types) != file.num_hidden_layers:
            raise ValueError(
                f"{CONFIG}: layer_types is {odd or len(file.layer_types)}, and {file.num_hidden_layers} of "
                f"{' or '.join(kinds)} are needed; {ADVICE}"
            )
        sliding = tuple(kind == kinds[1] for kind in file.layer_types)
    return tuple(window if slides else None for slides in sliding)
