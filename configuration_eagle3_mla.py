"""Configuration of an EAGLE-3 draft head with multi-head latent attention (MLA).

A draft head belongs to one target model: it reads three hidden states of the target and predicts the target's next
tokens. Most of its shape is therefore copied from the target (`Eagle3MLAConfig.from_target`); what is its own is the
attention (how many numbers per position the draft's cache holds) and the draft vocabulary.
"""

from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils.versions import require_version

# Said here, where loading begins: older versions load the head, and fail in the midst of `generate()`.
require_version("transformers>=5.17", "This draft head needs it: pip install -U transformers")

ATTENTION_TYPES = ("mla", "gqa")
KV_NORM_TYPES = ("layer_norm", "rms_norm")
# RoPE types whose frequencies depend on neither the sequence length nor the width that is rotated, with the numbers
# that each needs.
ROPE_TYPES = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("rope_theta", "factor", "original_max_position_embeddings"),
}

# What vLLM and SGLang can serve as `Eagle3DeepseekV2ForCausalLM`: decoupled RoPE, an RMSNorm on the latent, a
# compressed query, and C + R = 320, one of the two widths that vLLM's MLA kernels take.
ENGINE_PRESET = {
    "attention_type": "mla",
    "mla_latent_dim": 256,
    "mla_rope_dim": 64,
    "mla_kv_norm_type": "rms_norm",
    "mla_q_lora_rank": 1536,
}
PRESETS = {"engine": ENGINE_PRESET}

# What model families call the fields that a draft takes over.
NORM_EPS_NAMES = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")
ACTIVATION_NAMES = ("hidden_act", "hidden_activation", "activation_function")

# The draft of an MLA target does not copy that target's heads, it takes this plain grouped-query geometry.
MLA_TARGET_HEAD_DIM = 128
MLA_TARGET_KEY_VALUE_HEADS = 8


class Eagle3MLAConfig(PreTrainedConfig):
    r"""
    Configuration of [`Eagle3MLADraftModel`]. The default widths are those of Llama-3.1-8B.

    Args:
        vocab_size (`int`, *optional*, defaults to 128256):
            Vocabulary of the **target**; `generate()` refuses a draft with any other.
        draft_vocab_size (`int`, *optional*, defaults to `vocab_size`):
            Rows of the draft's `lm_head`.
        target_hidden_size (`int`, *optional*, defaults to `hidden_size`):
            Width of the target's hidden states.
        target_num_hidden_layers (`int`, *optional*):
            Layers of the target, checked against the target where it is known.
        hidden_size (`int`, *optional*, defaults to 4096):
            Width of the draft's states.
        intermediate_size (`int`, *optional*, defaults to 14336):
            Width of the draft's MLP.
        num_hidden_layers (`int`, *optional*, defaults to 1):
            Layers of the draft.
        num_attention_heads (`int`, *optional*, defaults to 32):
            Query heads H.
        num_key_value_heads (`int`, *optional*, defaults to `num_attention_heads`):
            Key-value heads G. In an MLA head they are up-projected from the latent and never cached.
        head_dim (`int`, *optional*, defaults to `hidden_size // num_attention_heads`):
            Width d of one head, without the decoupled RoPE part.
        attention_type (`str`, *optional*, defaults to `"mla"`):
            `"mla"`, or `"gqa"`: the standard EAGLE-3 attention with `k_proj` and `v_proj`.
        mla_latent_dim (`int`, *optional*, defaults to `num_key_value_heads * head_dim // 4`):
            Width C of the cached latent `c_kv`. A standard head caches `2 * G * d` numbers per position:
            the default is 8 times smaller.
        mla_rope_dim (`int`, *optional*, defaults to 0):
            Width R of the decoupled RoPE (arXiv:2405.04434, Eq. 14-19). 0: standard RoPE on the up-projected keys.
        mla_use_kv_norm (`bool`, *optional*, defaults to `True`):
            Whether the latent is normalised before it is cached.
        mla_kv_norm_type (`str`, *optional*, defaults to `"layer_norm"`):
            `"layer_norm"` or `"rms_norm"`, the one that serving engines know.
        mla_q_lora_rank (`int`, *optional*):
            Rank of the query compression (arXiv:2405.04434, Eq. 12-13). `None` means a full query projection.
        hidden_act (`str`, *optional*, defaults to `"silu"`):
            Activation of the MLP.
        max_position_embeddings (`int`, *optional*, defaults to 131072):
            The target's. Serving engines refuse or crawl beyond a smaller value.
        rms_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of every norm of the draft.
        rope_parameters (`dict`, *optional*, defaults to RoPE with `rope_theta` 10000):
            RoPE in the form of transformers 5. Types: `"default"`, `"linear"`, `"llama3"`, `"yarn"`.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of random weights.
        eagle_aux_hidden_state_layer_ids (`list[int]`, *optional*):
            The three places where the target is read: the residual stream *before* layer i; for i = number of layers,
            after the last layer and before the final norm. Defaults to `default_aux_layer_ids` of the target's depth
            (of 32 layers where that is unknown).
        has_own_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the draft carries token embeddings of its own instead of using the target's.
        fc_norm (`bool`, *optional*, defaults to `False`):
            EAGLE-3.1: one RMSNorm per auxiliary state before `fc`.
        norm_output (`bool`, *optional*, defaults to `False`):
            EAGLE-3.1: the state that is fed back is the one after the final norm.
        embed_residual (`bool`, *optional*, defaults to `False`):
            Whether the first layer's residual stream also takes a projection of the token's normed embedding. A row
            otherwise learns of its own token only through the latent, `mla_latent_dim` numbers, which it caches for
            later rows. No serving engine knows this.

    Raises:
        ValueError: If a field is out of its bound or two fields exclude each other.

    Source: EAGLE-3, arXiv:2503.01840; MLA, arXiv:2405.04434, section 2.1.
    """

    model_type = "eagle3_mla"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (the base class reads a plain list)

    vocab_size: int = 128256
    draft_vocab_size: int | None = None
    target_hidden_size: int | None = None
    target_num_hidden_layers: int | None = None
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_type: str = "mla"
    mla_latent_dim: int | None = None
    mla_rope_dim: int = 0
    mla_use_kv_norm: bool = True
    mla_kv_norm_type: str = "layer_norm"
    mla_q_lora_rank: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_parameters: dict | None = None
    initializer_range: float = 0.02
    eagle_aux_hidden_state_layer_ids: list[int] | None = None
    has_own_embeddings: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    embed_residual: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        self._check_positive("vocab_size", "hidden_size", "num_attention_heads")
        self._check_positive("num_key_value_heads", "head_dim", "target_num_hidden_layers", may_be_none=True)
        if self.draft_vocab_size is None:
            self.draft_vocab_size = self.vocab_size
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.mla_latent_dim is None:
            self.mla_latent_dim = max(1, self.num_key_value_heads * self.head_dim // 4)
        if self.eagle_aux_hidden_state_layer_ids is None:
            self.eagle_aux_hidden_state_layer_ids = default_aux_layer_ids(self.target_num_hidden_layers or 32)
        if not isinstance(self.rope_parameters, dict | None):
            raise ValueError(f"`rope_parameters` must be a dictionary, got {self.rope_parameters!r}.")
        super().__post_init__(**kwargs)
        self._check_sizes()
        self._check_switches()
        self._check_attention()
        self._check_rope()
        self._check_aux_layers()

    @classmethod
    def from_target(cls, target_config: PreTrainedConfig, preset: str | None = None, **overrides: Any):
        """
        Configuration of a draft for `target_config`, a decoder-only model's.

        Args:
            target_config (`PreTrainedConfig`):
                The target's configuration; of a multimodal one the text part is taken.
            preset (`str`, *optional*):
                `"engine"` gives the form that vLLM and SGLang can serve: `mla_rope_dim` 64, `rms_norm`, query
                compression, `mla_latent_dim` 256.
            overrides:
                Fields of this class, which win over the target's and the preset's.

        Returns:
            `Eagle3MLAConfig`

        Raises:
            ValueError: If the target is an encoder-decoder or has only one layer, or an override is out of bounds.
        """
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"`preset` must be one of {sorted(PRESETS)}, got {preset!r}.")
        if target_config.is_encoder_decoder:
            raise ValueError(f"The target must be decoder-only, got an encoder-decoder ({target_config.model_type}).")
        text_config = target_config.get_text_config(decoder=True)
        fields = _fields_of_target(text_config) | PRESETS.get(preset, {}) | overrides
        return cls(**fields)

    @property
    def owns_embeddings(self) -> bool:
        """Whether `embed_tokens` is part of the draft: it asks for it, or the target's has another width."""
        return self.has_own_embeddings or self.hidden_size != self.target_hidden_size

    @property
    def cached_elements_per_token(self) -> int:
        """Numbers that one layer's cache holds per position: `C + R`, or `2 * G * d` for the standard attention."""
        if self.attention_type == "gqa":
            return 2 * self.num_key_value_heads * self.head_dim
        return self.mla_latent_dim + self.mla_rope_dim

    def to_diff_dict(self) -> dict[str, Any]:
        """Every field of this class: one that equals a derived default must not be derived anew from the file."""
        own_fields = {name: getattr(self, name) for name in Eagle3MLAConfig.__annotations__}
        return super().to_diff_dict() | own_fields

    def _check_positive(self, *names: str, may_be_none: bool = False) -> None:
        for name in names:
            value = getattr(self, name)
            if value is None and may_be_none:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")

    def _check_sizes(self) -> None:
        self._check_positive("draft_vocab_size", "target_hidden_size", "intermediate_size", "num_hidden_layers")
        self._check_positive("head_dim", "max_position_embeddings")
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(
                f"`draft_vocab_size` must be at most `vocab_size` ({self.vocab_size}), got {self.draft_vocab_size}."
            )
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"`num_key_value_heads` must divide `num_attention_heads` ({self.num_attention_heads}), "
                f"got {self.num_key_value_heads}."
            )
        for name in ("rms_norm_eps", "initializer_range"):
            if not is_positive_number(getattr(self, name)):
                raise ValueError(f"`{name}` must be a positive number, got {getattr(self, name)!r}.")

    def _check_switches(self) -> None:
        for name in ("mla_use_kv_norm", "has_own_embeddings", "fc_norm", "norm_output", "embed_residual"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be true or false, got {getattr(self, name)!r}.")
        if self.tie_word_embeddings is not False:
            raise ValueError("`tie_word_embeddings` must be false: a draft's `lm_head` has its own vocabulary.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` must be an activation of transformers, got {self.hidden_act!r}.")

    def _check_attention(self) -> None:
        if self.attention_type not in ATTENTION_TYPES:
            raise ValueError(f"`attention_type` must be one of {ATTENTION_TYPES}, got {self.attention_type!r}.")
        if self.mla_kv_norm_type not in KV_NORM_TYPES:
            raise ValueError(f"`mla_kv_norm_type` must be one of {KV_NORM_TYPES}, got {self.mla_kv_norm_type!r}.")
        self._check_positive("mla_latent_dim")
        if type(self.mla_rope_dim) is not int or self.mla_rope_dim < 0 or self.mla_rope_dim % 2 != 0:
            raise ValueError(
                f"`mla_rope_dim` must be 0 or a positive even number (RoPE rotates pairs), got {self.mla_rope_dim!r}."
            )
        if self.mla_q_lora_rank is not None:
            self._check_positive("mla_q_lora_rank")
        if self.attention_type == "gqa" and (self.mla_rope_dim > 0 or self.mla_q_lora_rank is not None):
            raise ValueError(
                '`mla_rope_dim` and `mla_q_lora_rank` belong to `attention_type="mla"`; with "gqa" they must be 0 and '
                f"None, got {self.mla_rope_dim} and {self.mla_q_lora_rank}."
            )
        rotates_heads = self.attention_type == "gqa" or self.mla_rope_dim == 0
        if rotates_heads and self.head_dim % 2 != 0:
            raise ValueError(f"`head_dim` must be even (RoPE rotates pairs), got {self.head_dim}.")

    def _check_rope(self) -> None:
        rope = self.rope_parameters
        rope_type = rope.get("rope_type")
        if rope_type not in ROPE_TYPES:
            raise ValueError(
                f"`rope_parameters['rope_type']` must be one of {list(ROPE_TYPES)}, got {rope_type!r}. "
                "`Eagle3MLAConfig.from_target` chooses one that suits the target."
            )
        for name in ROPE_TYPES[rope_type]:
            if not is_positive_number(rope.get(name)):
                raise ValueError(
                    f"`rope_parameters[{name!r}]` must be a positive number for the type {rope_type!r}, "
                    f"got {rope.get(name)!r}."
                )
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                "`rope_parameters['partial_rotary_factor']` must be 1, a draft rotates whole heads; "
                f"got {rope['partial_rotary_factor']!r}."
            )

    def _check_aux_layers(self) -> None:
        layer_ids = self.eagle_aux_hidden_state_layer_ids
        is_list_of_ids = isinstance(layer_ids, list | tuple) and all(type(index) is int for index in layer_ids)
        if not is_list_of_ids or len(layer_ids) != 3 or sorted(set(layer_ids)) != list(layer_ids) or layer_ids[0] < 0:
            raise ValueError(
                "`eagle_aux_hidden_state_layer_ids` must be three different layer indices of at least 0 in rising "
                f"order, got {layer_ids!r}."
            )
        num_layers = self.target_num_hidden_layers
        if num_layers is not None and layer_ids[-1] > num_layers:
            raise ValueError(
                "`eagle_aux_hidden_state_layer_ids` must be at most `target_num_hidden_layers` "
                f"({num_layers}), got {layer_ids!r}."
            )


def is_positive_number(value: Any) -> bool:
    """Whether `value` is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def default_aux_layer_ids(num_layers: int) -> list[int]:
    """
    Where a target of `num_layers` layers is read: `[2, n // 2, n - 3]`, the choice of EAGLE-3 that all serving engines
    share, and the nearest rising triple for a target too shallow for it.

    Raises:
        ValueError: If `num_layers` is below 2.
    """
    if num_layers < 2:
        raise ValueError(f"`num_hidden_layers` of the target must be at least 2, got {num_layers}.")
    if num_layers == 2:
        return [0, 1, 2]
    if num_layers <= 4:
        return [1, 2, 3]
    if num_layers <= 6:
        return [1, num_layers // 2, num_layers - 1]
    return [2, num_layers // 2, num_layers - 3]


def _fields_of_target(text_config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that a draft takes over from its target."""
    hidden_size = text_config.hidden_size
    return {
        "vocab_size": text_config.vocab_size,
        "target_hidden_size": hidden_size,
        "target_num_hidden_layers": text_config.num_hidden_layers,
        "hidden_size": hidden_size,
        "intermediate_size": _intermediate_size(text_config),
        "rms_norm_eps": _first_of(text_config, NORM_EPS_NAMES, 1e-6),
        "hidden_act": _first_of(text_config, ACTIVATION_NAMES, "silu"),
        "max_position_embeddings": _first_of(text_config, ("max_position_embeddings", "max_seq_len"), 131072),
        "rope_parameters": _rope_of_target(text_config),
        **_heads_of_target(text_config),
    }


def _heads_of_target(text_config: PreTrainedConfig) -> dict[str, int]:
    if getattr(text_config, "kv_lora_rank", None) is not None:
        groups = max(1, text_config.hidden_size // (MLA_TARGET_HEAD_DIM * MLA_TARGET_KEY_VALUE_HEADS))
        return {
            "num_attention_heads": groups * MLA_TARGET_KEY_VALUE_HEADS,
            "num_key_value_heads": MLA_TARGET_KEY_VALUE_HEADS,
            "head_dim": MLA_TARGET_HEAD_DIM,
        }
    num_heads = text_config.num_attention_heads
    return {
        "num_attention_heads": num_heads,
        "num_key_value_heads": _first_of(text_config, ("num_key_value_heads",), num_heads),
        "head_dim": _first_of(text_config, ("head_dim",), text_config.hidden_size // num_heads),
    }


def _intermediate_size(text_config: PreTrainedConfig) -> int:
    """The target's MLP width; four times the hidden size where the target has none, or one per layer."""
    size = _first_of(text_config, ("intermediate_size", "ffn_dim", "n_inner"), None)
    return size if isinstance(size, int) else 4 * text_config.hidden_size


def _rope_of_target(text_config: PreTrainedConfig) -> dict[str, Any]:
    """
    The target's RoPE, of its full-attention layers where layers differ. A type whose frequencies depend on the
    sequence length or on the rotated width ("dynamic", "longrope") becomes plain RoPE with the same base.
    """
    rope = getattr(text_config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    rope_theta = rope.get("rope_theta", 10000.0)
    if rope.get("rope_type", "default") in ("default", "dynamic", "longrope") or rope["rope_type"] not in ROPE_TYPES:
        return {"rope_type": "default", "rope_theta": rope_theta}
    return {name: value for name, value in rope.items() if name != "partial_rotary_factor"}


def _first_of(config: PreTrainedConfig, names: tuple[str, ...], default: Any) -> Any:
    """The first of the attributes `names` that `config` has for all layers and that is not `None`."""
    values = (_for_all_layers(config, name) for name in names)
    return next((value for value in values if value is not None), default)


def _for_all_layers(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # how a configuration of transformers 5.23 says that layers differ in it, as Gemma 4's
        return None


__all__ = ["Eagle3MLAConfig"]
